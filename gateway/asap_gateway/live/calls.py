"""One request to a model server: chosen, begun, read piece by piece, each wait bounded.

Another server is tried only where not a byte of an answer has come. What a server says about an
error is not passed on: it may quote a prompt.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from asap.errors import (
    AsapError,
    InvalidInput,
    Overloaded,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from asap_gateway.live.settings import ServingSettings
from asap_gateway.live.upstreams import Backend, Route
from asap_runtime.logs import get_logger

__all__ = ["Call", "Caller", "open_session"]

BUFFER_BYTES = 64 * 2**10
"""The library reads ahead twice as much; with the sockets' own buffers 256 KiB of a stream."""
KEPT_ALIVE_S = 4.0
"""Below the 5 s of vLLM's server: a request must not meet a connection that is being closed."""
REFUSALS = frozenset({429, 503})
"""Statuses of a server that has not begun."""


def open_session(settings: ServingSettings) -> aiohttp.ClientSession:
    """Connections to all servers, a pool for each; wants a running loop."""
    headers = {"Accept-Encoding": "identity", "User-Agent": "asap"}
    if settings.api_key is not None:
        headers["Authorization"] = f"Bearer {settings.api_key.get_secret_value().strip()}"
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEPT_ALIVE_S),
        headers=headers,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=settings.connect_s),
        read_bufsize=BUFFER_BYTES,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
    )


@dataclass(slots=True, eq=False)
class Call:
    """An answer under way; its status is 200."""

    backend: Backend
    first: bytes
    """What came first; empty unless the answer is a stream."""
    ends_at: float
    _response: aiohttp.ClientResponse
    _gap_s: float
    _ended_by: AsapError | None = None

    async def read(self) -> bytes:
        """The next bytes, b"" at the end. Raises UpstreamError when it breaks off, UpstreamTimeout
        when it falls silent.
        """
        if self.first:
            first, self.first = self.first, b""
            return first
        return await self._next(self._gap_s)

    async def whole(self, most: int) -> bytes:
        """All that is left, up to `most` bytes."""
        pieces, size = [], 0
        while piece := await self._next(self.ends_at):  # silence is normal before a whole answer
            pieces.append(piece)
            size += len(piece)
            if size > most:
                raise UpstreamError("the model server's answer is too long")
        return b"".join(pieces)

    def end(self, error: AsapError) -> None:
        """Break off; whoever reads gets the error."""
        self._ended_by = error
        self._response.close()

    async def _next(self, gap_s: float) -> bytes:
        now = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(min(now + gap_s, self.ends_at)):
                return await self._response.content.readany()
        except TimeoutError:
            self.backend.failed(now)
            failure: AsapError = UpstreamTimeout("the model server fell silent")
        except (aiohttp.ClientError, OSError):
            failure = self._ended_by or UpstreamError("the model server broke off its answer")
        raise failure


class Caller:
    """Makes calls; one for all requests.

    Args:
        session: of `open_session`.
        settings: the time-outs.
    """

    def __init__(self, session: aiohttp.ClientSession, settings: ServingSettings) -> None:
        self._session, self._settings = session, settings
        self.calls: set[Call] = set()
        """Under way."""
        self._beginning: set[asyncio.Timeout] = set()
        self._ended_by: AsapError | None = None

    def end(self, error: AsapError) -> None:
        """Break off all calls and begin no more; whoever waits for one gets the error."""
        self._ended_by = error
        for limit in self._beginning:
            limit.reschedule(0.0)
        for call in self.calls:
            call.end(error)

    @asynccontextmanager
    async def call(
        self,
        route: Route,
        path: str,
        body: Mapping[str, Any],
        *,
        ends_at: float,
        prefer: Backend | None = None,
        request_id: str | None = None,
    ) -> AsyncIterator[Call]:
        """The answer of the first server that gives one; leaving the block ends the generation.

        Args:
            route: model and servers.
            path: such as /v1/completions.
            body: without the model; whether it streams decides which time-outs hold.
            ends_at: on the loop's clock.
            prefer: the server that has the prompt in its cache, if it is well.
            request_id: for the server's log.

        Raises UpstreamUnavailable, UpstreamTimeout, UpstreamError, Overloaded, and InvalidInput
        where the server finds the request wrong.
        """
        tried: list[Backend] = []
        failure: AsapError | None = None
        while True:
            try:
                backend = route.pick(tried, prefer)
            except UpstreamUnavailable as none_left:
                raise failure or none_left from None
            tried.append(backend)
            backend.outstanding += 1
            try:
                headers = {"Content-Type": "application/json"}
                if request_id is not None:
                    headers["X-Request-Id"] = request_id
                data = json.dumps({**body, "model": route.name_at(backend)}).encode()
                begun = await self._begin(backend, path, data, headers, body, ends_at)
                if isinstance(begun, AsapError):
                    failure = begun
                    get_logger().warning(
                        "serving.retried", address=backend.address, code=begun.problem_code
                    )
                    continue
                try:
                    self.calls.add(begun)
                    yield begun
                    return
                finally:
                    self.calls.discard(begun)
                    begun._response.close()
            finally:
                backend.outstanding -= 1

    async def _begin(
        self,
        backend: Backend,
        path: str,
        data: bytes,
        headers: Mapping[str, str],
        body: Mapping[str, Any],
        ends_at: float,
    ) -> Call | AsapError:
        """A call, or an error where another server may be tried."""
        if self._ended_by is not None:
            raise self._ended_by
        loop = asyncio.get_running_loop()
        stream = bool(body.get("stream"))
        until = min(loop.time() + self._settings.first_byte_s, ends_at) if stream else ends_at
        response: aiohttp.ClientResponse | None = None
        limit = asyncio.timeout_at(until)
        try:
            async with limit:
                self._beginning.add(limit)
                response = await self._session.post(backend.url + path, data=data, headers=headers)
                if response.status != 200:
                    return _failure(backend, response.status, loop.time())
                first = await response.content.readany() if stream else b""
                if stream and not first:
                    raise aiohttp.ClientPayloadError
            backend.succeeded()
            call = Call(backend, first, ends_at, response, self._settings.gap_s)
            response = None
            return call
        except aiohttp.ConnectionTimeoutError:
            backend.failed(loop.time())
            return UpstreamUnavailable("the model server cannot be reached")
        except TimeoutError:
            if self._ended_by is not None:
                raise self._ended_by from None
            backend.failed(loop.time())
            failure: AsapError = UpstreamTimeout("the model server did not answer in time")
        except (aiohttp.ClientError, OSError):
            backend.failed(loop.time())
            return UpstreamUnavailable("the model server cannot be reached")
        finally:
            self._beginning.discard(limit)
            if response is not None:
                response.close()
        raise failure


def _failure(backend: Backend, status: int, now: float) -> AsapError:
    """What a status other than 200 means; raised unless another server may be tried."""
    if status in REFUSALS:
        if status == 429:
            return Overloaded("the model server is busy; try again later", retry_after_s=2.0)
        return UpstreamUnavailable("the model server is not ready", retry_after_s=2.0)
    if status in (400, 413, 422):
        raise InvalidInput(
            f"the model server refuses the request with status {status}; check its parameters, "
            "and that prompt and max_tokens fit the model's context",
            status=status,
        )
    if status >= 500:
        backend.failed(now)
    raise UpstreamError(f"the model server answered with status {status}", status=status)
