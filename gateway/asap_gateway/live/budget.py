"""A bounded thinking: after so many tokens, or when it turns in a circle, it is closed with a
phrase, and the model goes on with the answer.

The generation is ended at the model server and begun again by `/v1/completions`, with the prompt as
the server itself rendered it (`return_prompt_text`, vLLM 0.32 and later) and all that was written
so far. The caller sees one stream.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any, Final

from asap.errors import UpstreamError
from asap.extraction import LOOP_CHARACTERS, LOOP_REPEATS, LOOP_TAIL, ends_in_loop
from asap.thinking import CLOSE, OPEN
from asap_gateway.live.calls import Call
from asap_gateway.live.requests import FIELDS, Asked, Thinking
from asap_gateway.live.streams import chunks, text_of
from asap_gateway.live.think_splitter import ThinkSplitter
from asap_gateway.live.upstreams import Backend, Route
from asap_gateway.live.usage import Tally
from asap_runtime.telemetry import PROXY_FORCED

__all__ = ["Ask", "Governor", "begins_thinking", "closing", "counted"]

Ask = Callable[[str, Mapping[str, Any], Backend | None], AbstractAsyncContextManager[Call]]
"""Path, body, and the server that has the prompt in its cache."""

LOOKED_AT_EVERY = 128
"""Characters of thinking between two looks for a loop."""
_SENSE = 48
"""A loop of 200 characters repeats its last 50 ones within the tail."""
_KEPT: Final = FIELDS["chat/completions"] & FIELDS["completions"] - {"min_tokens", "n"}
_STREAMED: Final = {
    "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
}
SHORTEST_TOKEN = 3
"""Characters; the closing phrase is reckoned with as many tokens before the server counts them."""


def closing(phrase: str) -> str:
    """What is written at the end of a thinking that is cut off."""
    return f"\n\n{phrase}\n{CLOSE}\n"


def begins_thinking(asked: Asked, route: Route) -> bool:
    """Whether the completion of this request begins within the thinking."""
    prompt = asked.body.get("prompt")
    prompts = prompt if isinstance(prompt, list) else [prompt]
    texts = [text for text in prompts if isinstance(text, str)]
    if not texts:  # a chat, or token ids
        return route.opened
    return all(text.rstrip().endswith(OPEN) for text in texts)


async def counted(call: Call, tally: Tally, *, opened: bool) -> AsyncGenerator[dict[str, Any]]:
    """The chunks of a stream that counts its tokens as it goes; `tally` grows with them.

    Each is yielded without its count but for the last, which has nothing else.
    """
    splitters: dict[int, ThinkSplitter] = {}
    thought: dict[int, int] = {}
    async for chunk in chunks(call):
        usage = chunk.pop("usage", None)
        tally.read(usage)
        for choice in chunk.get("choices") or ():
            text, reasoning = text_of(choice)
            tally.completion += usage is None and bool(text or reasoning)
            index = choice.get("index", 0)
            splitter = splitters.setdefault(index, ThinkSplitter(opened=opened))
            splitter.feed(text)
            if reasoning or (text and splitter.thinks):
                thought[index] = tally.completion
        tally.reasoning = sum(thought.values())
        if chunk.get("choices"):
            yield chunk
        elif usage is not None:
            yield {**chunk, "usage": usage}


class Governor:
    """One request whose thinking may have to be closed.

    Args:
        asked: the request.
        route: its model.
        ask: makes a call; the thinking and what follows are two.
        tally: grows while chunks come.
        phrase: what ends a thinking that is cut off.
    """

    def __init__(self, asked: Asked, route: Route, ask: Ask, tally: Tally, phrase: str) -> None:
        self._asked, self._route, self._ask, self._tally = asked, route, ask, tally
        self._closing = closing(phrase)
        self._opened = begins_thinking(asked, route)
        self._watch = _Watch(asked.thinking, opened=self._opened)
        self._prompt: str | None = asked.body.get("prompt")
        self._used = 0
        """Tokens of what was passed on."""

    async def chunks(self) -> AsyncGenerator[dict[str, Any]]:
        """The completion's chunks, the usage of the whole last."""
        body = {**self._asked.body, **_STREAMED}
        if self._prompt is None:
            body["return_prompt_text"] = True
        template: dict[str, Any] = {}
        async with self._ask(self._asked.path, body, None) as call:
            source = counted(call, self._tally, opened=self._opened)
            async with aclosing(source):
                async for chunk in source:
                    self._prompt = chunk.pop("prompt_text", None) or self._prompt
                    reason = self._watch.stops(chunk, self._tally.completion)
                    if reason is not None:
                        template = template or chunk
                        break
                    self._used = self._tally.completion
                    template = chunk if chunk["choices"] else template
                    yield chunk
                else:
                    return
        if self._prompt is None:
            raise UpstreamError(
                "the model server does not tell its prompt; a thinking budget and the loop guard "
                "need vLLM 0.32 or later"
            )
        forced = len(self._closing) // SHORTEST_TOKEN + 1
        left = self._left(forced)
        if left is not None and left <= 0:  # a phrase that does not fit would be beyond the limit
            self._tally.reasoning = self._tally.completion = self._used
            yield _said(template, "", "length")
            yield {**template, "choices": [], "usage": {}}
            return
        self._tally.forced = reason
        self._tally.reasoning = self._tally.completion = self._used + forced
        PROXY_FORCED.labels(self._route.model, reason).inc()
        yield _said(template, self._closing, None)
        async with aclosing(self._answer(call.backend, template, left)) as answer:
            async for chunk in answer:
                yield chunk

    async def _answer(
        self, backend: Backend, template: dict[str, Any], left: int | None
    ) -> AsyncGenerator[dict[str, Any]]:
        """The chunks behind the closing phrase, of so many tokens at most."""
        prompt, tally = self._tally.prompt, self._tally
        assert self._prompt is not None
        body = {name: self._asked.body[name] for name in self._asked.body if name in _KEPT}
        if self._asked.kind == "chat/completions":
            body["add_special_tokens"] = False  # they are in the text
        text = self._prompt + self._watch.text + self._closing
        body |= {**_STREAMED, "prompt": text, "max_tokens": left}
        rest = Tally()
        async with self._ask("/v1/completions", body, backend) as call:
            source = counted(call, rest, opened=False)
            async with aclosing(source):
                async for chunk in source:
                    if rest.prompt:  # the server has counted the phrase
                        tally.reasoning = rest.prompt - prompt
                    assert tally.reasoning is not None
                    tally.completion = tally.reasoning + rest.completion
                    for choice in chunk["choices"]:
                        yield _said(template, choice.get("text") or "", choice["finish_reason"])
                    if not chunk["choices"]:
                        yield {**template, "choices": [], "usage": chunk["usage"]}

    def _left(self, forced: int) -> int | None:
        most = self._asked.max_tokens
        if most is None and self._asked.kind == "completions":
            most = 16  # the endpoint's default
        return None if most is None else most - self._used - forced


class _Watch:
    """Looks at the thinking as it grows, and says when it must end."""

    def __init__(self, limits: Thinking, *, opened: bool) -> None:
        self._limits = limits
        self._splitter = ThinkSplitter(opened=opened)
        self._pieces: list[str] = []
        self._unseen = 0

    @property
    def text(self) -> str:
        """All that was passed on."""
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    def stops(self, chunk: Mapping[str, Any], tokens: int) -> str | None:
        """Why this chunk, with which the completion has so many tokens, must not go on."""
        for choice in chunk["choices"]:
            text, reasoning = text_of(choice)
            thinks = bool(text) and self._splitter.thinks
            self._splitter.feed(text)
            if thinks and not self._splitter.closed and not choice.get("finish_reason"):
                most = self._limits.budget_tokens
                if most is not None and tokens > most:
                    return "budget"
                if self._limits.loop_guard and self._turns(len(text)):
                    return "loop"
            self._pieces.append(text + reasoning)
        return None

    def _turns(self, grown: int) -> bool:
        self._unseen += grown
        if self._unseen < LOOKED_AT_EVERY:
            return False
        self._unseen = 0
        tail = self.text.rstrip()[-LOOP_TAIL:]
        if len(tail) < LOOP_CHARACTERS:
            return False
        before = len(tail) - _SENSE - LOOP_TAIL // LOOP_REPEATS
        if tail.rfind(tail[-_SENSE:], max(0, before), len(tail) - 1) < 0:
            return False  # nearly always, and a thousand times quicker than the question itself
        return ends_in_loop(tail)


def _said(template: Mapping[str, Any], text: str, finish: str | None) -> dict[str, Any]:
    """A chunk like the template with this text."""
    old = template["choices"][0]
    said: dict[str, Any] = {"text": text} if "text" in old else {"delta": {"content": text}}
    choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish}
    return {**template, "choices": [choice]}
