"""A scripted model server with vLLM's shapes: real HTTP on a free port, streams, and their faults.

    with FakeVllm(model="asap") as server:
        server.script = [Say("<think>", "a", "</think>", "b")]
        ...  # server.url, server.requests, server.cancelled

It runs in a thread of its own. A script is used in order of arrival, its last item repeats. A
completion whose prompt holds a closing tag that nobody but the gateway can have written is answered
from `after`.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from aiohttp import web

from waiting import PATIENCE_S, stop_serving, until


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """Base of what may happen to a request."""

    delay_s: float = 0.0
    """Silence before anything is sent."""


@dataclass(frozen=True, slots=True, init=False)
class Say(Item):
    """These tokens, each in a chunk of its own."""

    tokens: tuple[str, ...]
    gap_s: float
    finish: str
    per_chunk: int
    waits_after: int | None
    """Say nothing more after so many tokens until `go` of the server is set; a whole answer waits
    likewise."""
    stops_after: int | None
    """Say nothing more after so many tokens, and keep the connection open."""
    resets_after: int | None
    """Close the connection after so many."""
    ends_after: int | None
    """End the body properly after so many, without `[DONE]`."""
    fails_after: int | None
    """Report an error in the stream after so many."""

    def __init__(
        self,
        *tokens: str,
        gap_s: float = 0.0,
        finish: str = "stop",
        per_chunk: int = 1,
        waits_after: int | None = None,
        stops_after: int | None = None,
        resets_after: int | None = None,
        ends_after: int | None = None,
        fails_after: int | None = None,
        delay_s: float = 0.0,
    ) -> None:
        for name, value in locals().copy().items():
            if name != "self":
                object.__setattr__(self, name, value)


@dataclass(frozen=True, slots=True)
class Status(Item):
    """An error status whose body quotes the prompt."""

    status: int


@dataclass(frozen=True, slots=True)
class Lie(Item):
    """A whole answer that is shorter than its Content-Length says."""


@dataclass(frozen=True, slots=True)
class Garbage(Item):
    """Status 200 and something else."""

    content: bytes = b"<html>login</html>"
    content_type: str = "text/html"


@dataclass(frozen=True, slots=True)
class Drop(Item):
    """Close the connection without a byte."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it arrived."""

    path: str
    body: dict[str, Any]
    headers: dict[str, str]


@dataclass(slots=True)
class FakeVllm:
    """The server; listens while its `with` block runs."""

    model: str = "asap"
    context: int | None = 4096
    script: Sequence[Item] = (Say("hello", " world"),)
    after: Sequence[Item] = (Say("the", " answer"),)
    healthy: bool = True
    requests: list[Request] = field(default_factory=list)
    cancelled: list[float] = field(default_factory=list)
    """When generations ended whose caller had left, on the clock of `time.monotonic`."""
    concurrent: int = 0
    max_concurrent: int = 0
    sent_bytes: int = 0
    go: threading.Event = field(default_factory=threading.Event)
    """Lets those go on that wait in the middle of their answer."""
    url: str = ""
    port: int = 0
    _served: int = 0
    _loop: asyncio.AbstractEventLoop = field(init=False)
    _stop: asyncio.Event = field(init=False)
    _thread: threading.Thread = field(init=False)

    def __enter__(self) -> Self:
        listening = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(listening)), name="fake-vllm", daemon=True
        )
        self._thread.start()
        if not listening.wait(PATIENCE_S):
            raise RuntimeError("the fake model server does not listen")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE_S)

    def asked(self, path: str) -> list[dict[str, Any]]:
        """The bodies of the requests for the path."""
        return [one.body for one in self.requests if one.path == path]

    async def _serve(self, listening: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_post("/v1/chat/completions", self._answer)
        app.router.add_post("/v1/completions", self._answer)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/version", self._version)
        runner = web.AppRunner(
            app, handler_cancellation=True, shutdown_timeout=0.1, access_log=None
        )
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", self.port, backlog=2048).start()
            self.port = runner.addresses[0][1]
            self.url = f"http://127.0.0.1:{self.port}"
            listening.set()
            await self._stop.wait()
        finally:
            await stop_serving(runner)

    async def _health(self, http: web.Request) -> web.Response:
        return web.Response(status=200 if self.healthy else 503)

    async def _version(self, http: web.Request) -> web.Response:
        return web.json_response({"version": "0.0.fake"})

    async def _models(self, http: web.Request) -> web.Response:
        row = {"id": self.model, "object": "model", "max_model_len": self.context}
        return web.json_response({"object": "list", "data": [row]})

    async def _answer(self, http: web.Request) -> web.StreamResponse:
        request = Request(http.path, await http.json(), dict(http.headers))
        self.requests.append(request)
        self.concurrent += 1
        self.max_concurrent = max(self.max_concurrent, self.concurrent)
        try:
            item = self._item(request)
            await asyncio.sleep(item.delay_s)
            return await self._send(http, request, item)
        except (asyncio.CancelledError, ConnectionError):
            self.cancelled.append(time.monotonic())
            raise
        finally:
            self.concurrent -= 1

    def _item(self, request: Request) -> Item:
        prompt = request.body.get("prompt")
        if isinstance(prompt, str) and "</think>" in prompt:
            return self.after[0]
        item = self.script[min(self._served, len(self.script) - 1)]
        self._served += 1
        return item

    async def _send(self, http: web.Request, request: Request, item: Item) -> web.StreamResponse:
        if isinstance(item, Status):
            error = {"message": f"cannot take {json.dumps(request.body)}", "code": item.status}
            return web.json_response({"error": error}, status=item.status)
        if isinstance(item, Garbage):
            return web.Response(body=item.content, content_type=item.content_type)
        if isinstance(item, Drop):
            assert http.transport is not None
            http.transport.abort()
            return web.Response()
        if isinstance(item, Lie):
            response = web.StreamResponse(headers={"Content-Length": "100000"})
            await response.prepare(http)
            await response.write(b'{"choices": [')
            assert http.transport is not None
            http.transport.close()
            return response
        assert isinstance(item, Say)
        answer = Answer(request, item, self.model)
        if not request.body.get("stream"):
            if item.waits_after is not None:
                await until(self.go.is_set)
            await asyncio.sleep(item.gap_s * len(item.tokens))
            return web.json_response(answer.whole())
        return await self._stream(http, item, answer)

    async def _stream(self, http: web.Request, item: Say, answer: Answer) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(http)
        sent = 0
        for count, data in answer.events():
            sent = max(sent, count)
            if item.waits_after is not None and count > item.waits_after:
                await until(self.go.is_set)
            if item.stops_after is not None and count > item.stops_after:
                await asyncio.sleep(3600)
            if item.resets_after is not None and count > item.resets_after:
                assert http.transport is not None
                http.transport.abort()
                return response
            if item.ends_after is not None and count > item.ends_after:
                return response
            if item.fails_after is not None and count > item.fails_after:
                data = {"error": {"message": f"lost {answer.prompt}", "code": 500}}
            text = data if isinstance(data, str) else json.dumps(data)
            await response.write(f"data: {text}\n\n".encode())
            self.sent_bytes += len(text)
            if item.gap_s and count:
                await asyncio.sleep(item.gap_s)
        return response


class Answer:
    """What one request gets, in the shape of its endpoint."""

    def __init__(self, request: Request, item: Say, model: str) -> None:
        self._body, self._item = request.body, item
        self._chat = request.path.endswith("chat/completions")
        name = "chat.completion" if self._chat else "text_completion"
        self._head = {"id": f"{name}-1", "object": name, "created": 1, "model": model}
        self.prompt = self._prompt()
        most = self._body.get("max_completion_tokens") or self._body.get("max_tokens") or 10**9
        self._tokens = item.tokens[:most]
        self._finish = item.finish if len(self._tokens) == len(item.tokens) else "length"

    def _prompt(self) -> str:
        if not self._chat:
            return str(self._body["prompt"])
        said = "".join(str(message["content"]) for message in self._body["messages"])
        return f"<user>{said}<assistant><think>\n"

    def whole(self) -> dict[str, Any]:
        """A whole answer."""
        text = "".join(self._tokens)
        said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        choices = [
            {"index": index, **said, "logprobs": None, "finish_reason": self._finish}
            for index in range(self._body.get("n") or 1)
        ]
        return {**self._head, "choices": choices, "usage": self._usage(len(self._tokens))}

    def events(self):
        """(tokens up to here, data) of each event."""
        options = self._body.get("stream_options") or {}
        head = self._head | ({"object": "chat.completion.chunk"} if self._chat else {})

        def chunk(choices: list[dict[str, Any]], count: int) -> dict[str, Any]:
            made = {**head, "choices": choices}
            if options.get("continuous_usage_stats"):
                made["usage"] = self._usage(count)
            return made

        if self._chat:
            first = chunk([self._choice({"role": "assistant", "content": ""})], 0)
            if self._body.get("return_prompt_text"):
                first["prompt_text"] = self.prompt
            yield 0, first
        size = self._item.per_chunk
        for at in range(0, len(self._tokens), size):
            text = "".join(self._tokens[at : at + size])
            count = min(at + size, len(self._tokens))
            last = count == len(self._tokens)
            said = {"content": text} if self._chat else text
            yield count, chunk([self._choice(said, self._finish if last else None)], count)
        if options.get("include_usage"):
            yield (
                len(self._tokens),
                {**head, "choices": [], "usage": self._usage(len(self._tokens))},
            )
        yield len(self._tokens), "[DONE]"

    def _choice(self, said: Any, finish: str | None = None) -> dict[str, Any]:
        name = "delta" if self._chat else "text"
        return {"index": 0, name: said, "logprobs": None, "finish_reason": finish}

    def _usage(self, completion: int) -> dict[str, int]:
        prompt = len(self.prompt.split())
        return {
            "prompt_tokens": prompt,
            "total_tokens": prompt + completion,
            "completion_tokens": completion,
        }
