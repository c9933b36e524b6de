"""Chunks and whole answers with the thinking set apart, and an answer put together from chunks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from asap_gateway.live.requests import Asked
from asap_gateway.live.think_splitter import ThinkSplitter, split_thinking

__all__ = ["Separator", "collect", "separate_answer"]


class Separator:
    """Moves the thinking of chat chunks from `content` to `reasoning_content`."""

    def __init__(self, *, opened: bool) -> None:
        self._opened = opened
        self._splitters: dict[int, ThinkSplitter] = {}

    def edit(self, chunk: dict[str, Any]) -> dict[str, Any] | None:
        """The chunk to send; None when all of it is held back."""
        if not chunk.get("choices"):
            return chunk
        choices = [self._edited(choice) for choice in chunk["choices"]]
        said = [choice for choice in choices if choice["delta"] or choice.get("finish_reason")]
        return {**chunk, "choices": said} if said else None

    def _edited(self, choice: dict[str, Any]) -> dict[str, Any]:
        delta = dict(choice.get("delta") or {})
        index = choice.get("index", 0)
        splitter = self._splitters.setdefault(index, ThinkSplitter(opened=self._opened))
        thinking, answer = splitter.feed(delta.pop("content", None) or "")
        if choice.get("finish_reason"):
            rest = splitter.finish()
            thinking, answer = thinking + rest[0], answer + rest[1]
        given = delta.pop("reasoning", None)
        if given or thinking:
            delta["reasoning_content"] = (given or "") + thinking
        if answer or "role" in delta:
            delta["content"] = answer
        return {**choice, "delta": delta}


def separate_answer(answer: dict[str, Any], *, opened: bool) -> dict[str, Any]:
    """A whole chat completion with the thinking apart."""
    choices = []
    for choice in answer.get("choices") or ():
        message = dict(choice.get("message") or {})
        if not message.get("reasoning"):
            thinking, content = split_thinking(message.get("content") or "", opened=opened)
            message |= {"reasoning_content": thinking, "content": content}
        choices.append({**choice, "message": message})
    return {**answer, "choices": choices}


async def collect(asked: Asked, source: AsyncIterator[dict[str, Any]]) -> dict[str, Any]:
    """One choice's chunks as the answer that a caller gets who does not stream."""
    head: dict[str, Any] = {}
    text, thinking, finish, usage = [], [], None, None
    async for chunk in source:
        head = head or {name: chunk.get(name) for name in ("id", "created", "model")}
        usage = chunk.get("usage") or usage
        for choice in chunk.get("choices") or ():
            finish = choice.get("finish_reason") or finish
            delta = choice.get("delta") or {}
            text.append(choice.get("text") or delta.get("content") or "")
            thinking.append(delta.get("reasoning_content") or "")
    choice = {"index": 0, "logprobs": None, "finish_reason": finish}
    if asked.kind == "completions":
        choice["text"] = "".join(text)
    else:
        message = {"role": "assistant", "content": "".join(text)}
        if asked.thinking.format == "separate":
            message["reasoning_content"] = "".join(thinking)
        choice["message"] = message
    kind = "text_completion" if asked.kind == "completions" else "chat.completion"
    return {**head, "object": kind, "choices": [choice], "usage": usage}
