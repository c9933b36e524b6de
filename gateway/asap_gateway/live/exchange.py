"""One live request from its admission to its last byte, whole or as a stream.

What runs here ends when the caller leaves, and with it the generation at the model server.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing
from time import perf_counter
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from asap.errors import AsapError, UpstreamError, UpstreamTimeout
from asap_gateway.auth import principal
from asap_gateway.live.budget import Governor, begins_thinking, counted
from asap_gateway.live.calls import Call
from asap_gateway.live.edits import Separator, collect, separate_answer
from asap_gateway.live.requests import Asked
from asap_gateway.live.serving import Serving
from asap_gateway.live.streams import DONE, PlainStream, error_event, event
from asap_gateway.live.think_splitter import split_thinking
from asap_gateway.live.upstreams import Backend, Route
from asap_gateway.live.usage import Tally, tokens_saved
from asap_runtime.http_problems import answer
from asap_runtime.problems import describe
from asap_runtime.telemetry import (
    PROXY_FIRST_BYTE_SECONDS,
    PROXY_SECONDS,
    PROXY_STREAMS,
    PROXY_TOKENS,
)

__all__ = ["SAVED_HEADER", "Exchange"]

SAVED_HEADER = "x-asap-tokens-saved"
MAX_ANSWER_BYTES = 64 * 2**20
CLOSE_S = 5.0
"""How much longer than its generation an answer to a slow caller may take."""
_STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
GONE = "499"
"""Status, in the metrics, of a request whose caller left."""


class Exchange(Response):
    """The answer to a request; does its work while it is sent."""

    def __init__(self, serving: Serving, route: Route, asked: Asked) -> None:
        super().__init__()
        self._serving, self._route = serving, route
        self._asked = _clamped(asked, route.context)
        self._opened = begins_thinking(asked, route)
        self._tally = Tally()
        self._began = perf_counter()
        self._ends_at = asyncio.get_running_loop().time() + serving.settings.total_s
        self._request_id: str | None = None
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; a caller that leaves ends all of it."""
        for name, value in scope["headers"]:
            if name == b"x-request-id" and len(value) <= 128:
                self._request_id = value.decode("latin-1")
        work = asyncio.create_task(self._measured(scope, receive, send))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        if not work.cancelled():
            work.result()

    async def _measured(self, scope: Scope, receive: Receive, send: Send) -> None:
        model, caller, tally = self._route.model, principal(scope), self._tally
        status = GONE
        try:
            with PROXY_STREAMS.labels(model).track_inprogress():
                error = await self._answered(scope, receive, send)
            status = "200" if error is None else str(describe(error)["status"])
        finally:
            seconds = perf_counter() - self._began
            PROXY_SECONDS.labels(model, status).observe(seconds)
            for part, count in (
                ("prompt", tally.prompt),
                ("completion", tally.completion),
                ("reasoning", tally.reasoning or 0),
            ):
                PROXY_TOKENS.labels(model, part).inc(count)
            self._serving.limits.spend(caller, tally.total)
        if status == "200" and self._serving.shadow is not None:
            self._serving.shadow.follow(caller.tenant, self._asked, tally, seconds)

    async def _answered(self, scope: Scope, receive: Receive, send: Send) -> AsapError | None:
        """Send an answer, or an error, which is returned, too."""
        try:
            async with asyncio.timeout_at(self._ends_at + CLOSE_S):
                with self._serving.limits.admitted(principal(scope)):
                    if self._asked.stream:
                        await self._stream(send)
                    else:
                        response = await self._whole()
                        PROXY_FIRST_BYTE_SECONDS.labels(self._route.model).observe(
                            perf_counter() - self._began
                        )
                        await response(scope, receive, send)
            return None
        except TimeoutError:
            return UpstreamTimeout("the caller did not take the answer in time")
        except AsapError as error:
            if self._started:
                await send({"type": "http.response.body", "body": error_event(error)})
            else:
                await answer(scope["path"], describe(error))(scope, receive, send)
            return error

    async def _stream(self, send: Send) -> None:
        pieces = self._plain() if self._is_plain else self._events()
        async with aclosing(pieces):
            async for piece in pieces:
                if not self._started:
                    self._started = True
                    PROXY_FIRST_BYTE_SECONDS.labels(self._route.model).observe(
                        perf_counter() - self._began
                    )
                    headers = [(k.encode(), v.encode()) for k, v in _STREAM_HEADERS.items()]
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _whole(self) -> Response:
        if self._asked.thinking.governed:
            async with aclosing(self._chunks()) as chunks:
                content = await collect(self._asked, chunks)
        else:
            async with self._ask(self._asked.path, self._asked.body, None) as call:
                content = self._told(_json(await call.whole(MAX_ANSWER_BYTES)))
        headers = {}
        if self._route.baseline_tokens is not None and self._tally.completion:
            saved = tokens_saved(self._route.baseline_tokens, self._tally.completion)
            headers[SAVED_HEADER] = str(saved)
        return JSONResponse(content, headers=headers)

    @property
    def _is_plain(self) -> bool:
        thinking = self._asked.thinking
        return thinking.format == "inline" and not thinking.governed

    def _ask(
        self, path: str, body: Mapping[str, Any], prefer: Backend | None
    ) -> AbstractAsyncContextManager[Call]:
        return self._serving.caller.call(
            self._route,
            path,
            body,
            ends_at=self._ends_at,
            prefer=prefer,
            request_id=self._request_id,
        )

    async def _plain(self) -> AsyncGenerator[bytes]:
        """The server's stream as it is."""
        given = self._asked.body.get("stream_options") or {}
        body = {**self._asked.body, "stream_options": {**given, "include_usage": True}}
        plain = PlainStream(
            wants_usage=self._asked.wants_usage,
            opened=self._opened,
            baseline=self._route.baseline_tokens,
        )
        self._tally = plain.tally
        async with self._ask(self._asked.path, body, None) as call:
            while piece := await call.read():
                if kept := plain.feed(piece):
                    yield kept
                if plain.failure is not None:
                    raise plain.failure
        if not plain.done:
            raise UpstreamError("the model server broke off its answer")
        plain.settle()

    async def _events(self) -> AsyncGenerator[bytes]:
        """An edited stream."""
        async with aclosing(self._chunks()) as chunks:
            async for chunk in chunks:
                if chunk["choices"] or self._asked.wants_usage:
                    yield event(chunk)
        yield DONE

    async def _chunks(self) -> AsyncGenerator[dict[str, Any]]:
        """Edited chunks, the usage of the whole last."""
        asked, settings = self._asked, self._serving.settings
        separator = Separator(opened=self._opened) if asked.thinking.format == "separate" else None
        if asked.thinking.governed:
            governor = Governor(asked, self._route, self._ask, self._tally, settings.closing_phrase)
            source = governor.chunks()
        else:
            source = self._counted()
        async with aclosing(source):
            async for chunk in source:
                if not chunk["choices"]:
                    usage = self._tally.told(chunk["usage"], self._route.baseline_tokens)
                    yield {**chunk, "usage": usage}
                elif separator is None:
                    yield chunk
                elif (edited := separator.edit(chunk)) is not None:
                    yield edited

    async def _counted(self) -> AsyncGenerator[dict[str, Any]]:
        options = {"include_usage": True, "continuous_usage_stats": True}
        body = {**self._asked.body, "stream_options": options}
        async with self._ask(self._asked.path, body, None) as call:
            source = counted(call, self._tally, opened=self._opened)
            async with aclosing(source):
                async for chunk in source:
                    yield chunk

    def _told(self, content: dict[str, Any]) -> dict[str, Any]:
        """A whole answer with its thinking counted, by its share of the characters."""
        self._tally.read(content.get("usage"))
        thought = written = 0
        for choice in content["choices"]:
            message = choice.get("message") or {"content": choice.get("text")}
            apart = message.get("reasoning") or message.get("reasoning_content") or ""
            text = message.get("content") or ""
            opened = self._opened and not apart
            thought += len(apart) + len(split_thinking(text, opened=opened)[0])
            written += len(apart) + len(text)
        self._tally.share(thought, written)
        if isinstance(content.get("usage"), dict):
            content["usage"] = self._tally.told(content["usage"], self._route.baseline_tokens)
        if self._asked.thinking.format == "separate":
            content = separate_answer(content, opened=self._opened)
        return content


async def _gone(receive: Receive) -> None:
    """Return when the caller has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _clamped(asked: Asked, context: int | None) -> Asked:
    """No more tokens than the model's context has."""
    if context is None:
        return asked
    body = dict(asked.body)
    for name in ("max_tokens", "max_completion_tokens"):
        if body.get(name) is not None:
            body[name] = min(body[name], context)
    return Asked(asked.kind, asked.model, body, asked.stream, asked.wants_usage, asked.thinking)


def _json(data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except ValueError:
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("choices"), list):
        raise UpstreamError("the model server's answer cannot be read")
    return content
