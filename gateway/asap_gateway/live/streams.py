"""Server-sent events of a completion: read as they come, and passed on as they are but for usage.

A stream that ends without `[DONE]`, or says that it failed, is no answer: whoever reads gets an
error, and the caller one event of ours instead of the server's.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any, Final

from asap.errors import AsapError, UpstreamError
from asap_gateway.live.calls import Call
from asap_gateway.live.think_splitter import ThinkSplitter
from asap_gateway.live.usage import Tally
from asap_runtime.http_problems import openai_error
from asap_runtime.problems import describe

__all__ = ["DONE", "EventReader", "PlainStream", "chunks", "error_event", "event", "text_of"]

DONE: Final = b"data: [DONE]\n\n"
MAX_EVENT_BYTES = 256 * 2**10
_END, _DATA = b"\n\n", b"data: "


class EventReader:
    """Events from bytes that are cut anywhere."""

    def __init__(self) -> None:
        self._pending = b""

    def feed(self, piece: bytes) -> list[bytes]:
        """The events that are whole now, without the blank line behind each."""
        *whole, self._pending = (self._pending + piece).split(_END)
        if len(self._pending) > MAX_EVENT_BYTES:
            raise UpstreamError("the model server's stream has an event without an end")
        return whole


class PlainStream:
    """Passes a stream on untouched, counting; only the usage at its end is ours to tell or to drop.

    Args:
        wants_usage: whether the caller asked for the usage that we had asked for.
        opened: see ThinkSplitter.
        baseline: mean tokens of the baseline's completions, if known.
    """

    def __init__(self, *, wants_usage: bool, opened: bool, baseline: float | None) -> None:
        self._wants_usage, self._opened, self._baseline = wants_usage, opened, baseline
        self._reader = EventReader()
        self._splitters: dict[int, ThinkSplitter] = {}
        self._thought = self._written = 0
        self.tally = Tally()
        self.done = False
        self.failure: UpstreamError | None = None
        """Of the server, by its own account."""

    def feed(self, piece: bytes) -> bytes:
        """What to send on now; `failure` says that it is the last."""
        kept: list[bytes] = []
        try:
            for one in self._reader.feed(piece):
                passed = self._pass(one)
                if passed is not None:
                    kept += passed, _END
        except UpstreamError as error:  # what came before it is good
            self.failure = error
        return b"".join(kept)

    def _pass(self, event_: bytes) -> bytes | None:
        chunk = _parsed(event_)
        if chunk is None:
            self.done = self.done or event_.startswith(DONE.rstrip())
            return event_
        if chunk.get("usage"):
            self.tally.read(chunk["usage"])
        for choice in chunk["choices"]:
            self._count(choice)
        if chunk["choices"] or not chunk.get("usage"):
            return event_
        if not self._wants_usage:
            return None
        self.tally.share(self._thought, self._written)
        chunk["usage"] = self.tally.told(chunk["usage"], self._baseline)
        return event(chunk)[: -len(_END)]

    def settle(self) -> Tally:
        """The counts, once the stream is over."""
        self.tally.share(self._thought, self._written)
        return self.tally

    def _count(self, choice: dict[str, Any]) -> None:
        """A piece of text is taken for as many tokens as any other: vLLM sends one with each."""
        text, reasoning = text_of(choice)
        if reasoning:
            self._thought += 1
            self._written += 1
        elif text:
            index = choice.get("index", 0)
            splitter = self._splitters.get(index)
            if splitter is None:
                splitter = self._splitters[index] = ThinkSplitter(opened=self._opened)
            splitter.feed(text)
            self._thought += splitter.thinks
            self._written += 1


def text_of(choice: dict[str, Any]) -> tuple[str, str]:
    """(text, thinking that the server has already set apart) of a chunk's choice."""
    if "text" in choice:
        return choice["text"] or "", ""
    delta = choice.get("delta") or {}
    return delta.get("content") or "", (
        delta.get("reasoning") or delta.get("reasoning_content") or ""
    )


async def chunks(call: Call) -> AsyncGenerator[dict[str, Any]]:
    """The parsed events up to `[DONE]`. Raises UpstreamError when they end without it."""
    reader = EventReader()
    while piece := await call.read():
        for one in reader.feed(piece):
            chunk = _parsed(one)
            if chunk is not None:
                yield chunk
            elif one.startswith(DONE.rstrip()):
                return
    raise UpstreamError("the model server broke off its answer")


def event(chunk: dict[str, Any]) -> bytes:
    """A chunk as an event."""
    text = json.dumps(chunk, ensure_ascii=False, separators=(",", ":"))
    return _DATA + text.encode() + _END


def error_event(error: AsapError) -> bytes:
    """The last event of a stream that cannot go on."""
    return event(openai_error(describe(error)))


def _parsed(event_: bytes) -> dict[str, Any] | None:
    """The chunk; None for what holds none, such as a comment or the end."""
    if not event_.startswith(_DATA + b"{"):
        return None
    try:
        chunk = json.loads(event_[len(_DATA) :])
    except ValueError:
        raise UpstreamError("the model server's stream cannot be read") from None
    if "error" in chunk:
        raise UpstreamError("the model server failed while it answered")
    assert isinstance(chunk, dict)
    if not all(isinstance(choice, dict) for choice in chunk.setdefault("choices", [])):
        raise UpstreamError("the model server's stream cannot be read")
    return chunk
