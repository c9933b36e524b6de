"""A scripted OpenAI-compatible server: real HTTP on a free port, and every fault we know of.

    with OpenAIServer([Status(429, retry_after="1"), Reply("yes")]) as server:
        ...  # server.base_url, server.requests, server.max_concurrent

It runs in a thread of its own, so it serves a synchronous test, a subprocess and an asyncio test
(`async with`) alike. A script is a list of items, used in order of arrival, of which the last
repeats; or a function of prompt and request body that returns an item. That function runs in the
server's thread; what it raises comes out of the `with` block.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from aiohttp import web

from waiting import PATIENCE_S, stop_serving


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """Base of what may happen to a request."""

    delay_s: float = 0.0
    """Silence before anything is sent."""


@dataclass(frozen=True, slots=True)
class Reply(Item):
    """A chat completion. `text` None sends a null content, `usage` None leaves the usage out."""

    text: str | None
    finish_reason: str | None = "stop"
    usage: tuple[int, int] | None = (10, 5)
    """Prompt tokens, completion tokens."""
    cached: int | None = None
    """Those of the prompt's tokens that a prefix cache held."""


@dataclass(frozen=True, slots=True)
class Status(Item):
    """An error status. Its body quotes prompt and key, as some servers do: neither may leak."""

    status: int
    retry_after: str | None = None
    retry_after_ms: str | None = None
    code: str | None = None
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Body(Item):
    """Status 200 with these bytes: broken JSON, another schema, a login page."""

    content: bytes
    content_type: str = "application/json"


@dataclass(frozen=True, slots=True)
class Stall(Item):
    """Never answer, or (`after_headers`) send headers and half a body and then nothing more."""

    after_headers: bool = False


@dataclass(frozen=True, slots=True)
class Trickle(Item):
    """A body that never ends but is never silent for longer than `every_s`."""

    every_s: float = 0.02


@dataclass(frozen=True, slots=True)
class Drop(Item):
    """Close the connection: at once, or (`after_headers`) in the middle of the body."""

    after_headers: bool = False


Responder = Callable[[str, dict[str, Any]], Item]


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it arrived; `at_s` is on the clock of `time.monotonic`."""

    body: dict[str, Any]
    headers: Mapping[str, str]
    at_s: float

    @property
    def prompt(self) -> str:
        """The text of the last message."""
        content = self.body["messages"][-1]["content"]
        assert isinstance(content, str)
        return content


@dataclass(slots=True)
class OpenAIServer:
    """The server; listens while its `with` (or `async with`) block runs.

    `takes_schema=False`: each request with a `response_format` gets 400 and uses up no script item.
    """

    script: Sequence[Item] | Responder
    takes_schema: bool = True
    requests: list[Request] = field(default_factory=list)
    max_concurrent: int = 0
    """Most requests that were being answered at one moment."""
    base_url: str = ""
    _served: int = 0
    _concurrent: int = 0
    _failure: Exception | None = None
    _arrived: threading.Condition = field(default_factory=threading.Condition)
    _loop: asyncio.AbstractEventLoop = field(init=False)
    _stop: asyncio.Event = field(init=False)
    _thread: threading.Thread = field(init=False)

    def __enter__(self) -> Self:
        listening = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(listening)), name="openai-server", daemon=True
        )
        self._thread.start()
        if not listening.wait(PATIENCE_S):
            raise RuntimeError(f"the scripted server does not listen after {PATIENCE_S:.0f} s")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE_S)
        if self._failure is not None:
            raise self._failure

    async def __aenter__(self) -> Self:
        return await asyncio.to_thread(self.__enter__)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.__exit__, kind, error, trace)

    def wait_for_requests(self, count: int, timeout_s: float = PATIENCE_S) -> None:
        """Block until `count` requests have arrived, answered or not."""
        with self._arrived:
            if not self._arrived.wait_for(lambda: len(self.requests) >= count, timeout_s):
                raise TimeoutError(f"{len(self.requests)} of {count} requests in {timeout_s:g} s")

    async def _serve(self, listening: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        app = web.Application(client_max_size=64 * 2**20)
        self._route(app)
        # Cancelled with their client: `max_concurrent` counts only requests that someone waits for.
        runner = web.AppRunner(
            app, handler_cancellation=True, shutdown_timeout=0.1, access_log=None
        )
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.base_url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
            listening.set()
            await self._stop.wait()
        finally:
            await stop_serving(runner)

    def _route(self, app: web.Application) -> None:
        app.router.add_post("/v1/chat/completions", self._answer)

    async def _answer(self, http: web.Request) -> web.StreamResponse:
        request = Request(await http.json(), dict(http.headers), time.monotonic())
        with self._arrived:
            self.requests.append(request)
            self._arrived.notify_all()
        self._concurrent += 1
        self.max_concurrent = max(self.max_concurrent, self._concurrent)
        try:
            item = self._item(request)
            await asyncio.sleep(item.delay_s)
            return await self._send(http, request, item)
        finally:
            self._concurrent -= 1

    def _item(self, request: Request) -> Item:
        if "response_format" in request.body and not self.takes_schema:
            return Status(400)
        if callable(self.script):
            try:
                return self.script(request.prompt, request.body)
            except Exception as error:
                self._failure = error
                return Status(418)
        item = self.script[min(self._served, len(self.script) - 1)]
        self._served += 1
        return item

    async def _send(self, http: web.Request, request: Request, item: Item) -> web.StreamResponse:
        match item:
            case Reply():
                return web.json_response(completion(request, item))
            case Status():
                return _error(request, item)
            case Body():
                return web.Response(body=item.content, content_type=item.content_type)
            case Stall(after_headers=after_headers):
                if after_headers:
                    await _begin(http)
                await self._stop.wait()
            case Trickle(every_s=every_s):
                response = await _begin(http)
                while not self._stop.is_set():
                    await response.write(b" ")
                    await asyncio.sleep(every_s)
            case Drop(after_headers=after_headers):
                if after_headers:
                    await _begin(http)
        assert http.transport is not None
        http.transport.abort()
        return web.Response()


async def _begin(http: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(http)
    await response.write(b'{"id": "x", "choices": [')
    return response


def completion(request: Request, reply: Reply) -> dict[str, Any]:
    completion: dict[str, Any] = {
        "id": "chatcmpl-scripted",
        "object": "chat.completion",
        "created": 0,
        "model": request.body["model"],
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": reply.text},
                "finish_reason": reply.finish_reason,
            }
        ],
    }
    if reply.usage is not None:
        sent, received = reply.usage
        completion["usage"] = {
            "prompt_tokens": sent,
            "completion_tokens": received,
            "total_tokens": sent + received,
        }
        if reply.cached is not None:
            completion["usage"]["prompt_tokens_details"] = {"cached_tokens": reply.cached}
    return completion


def _error(request: Request, item: Status) -> web.Response:
    headers = {"Retry-After": item.retry_after, "retry-after-ms": item.retry_after_ms}
    return web.Response(
        status=item.status,
        text=json.dumps(error_body(request, item)),
        content_type="application/json",
        headers={name: value for name, value in headers.items() if value is not None},
    )


def error_body(request: Request, item: Status) -> dict[str, Any]:
    """The JSON of a refusal."""
    key = request.headers.get("Authorization", "")
    message = f"scripted {item.status}: prompt {request.prompt!r}, credentials {key!r}"
    code = item.code or item.status
    error = {"message": message, "type": "scripted", "code": code, "param": item.param}
    return {"error": error}
