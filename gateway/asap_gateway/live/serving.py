"""Live serving as a whole: what runs beside the requests, and what they share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fastapi import Request

from asap.errors import UpstreamUnavailable
from asap_gateway.live.calls import Caller, open_session
from asap_gateway.live.key_limits import KeyLimits
from asap_gateway.live.settings import ServingSettings
from asap_gateway.live.shadow import Shadow
from asap_gateway.live.upstreams import Upstreams
from asap_runtime.endpoints import EndpointRegistry
from asap_runtime.logs import get_logger

__all__ = ["Serving", "get_serving"]


class Serving:
    """Routes, limits, connections and shadows; requests are answered while `running`.

    Args:
        settings: of live serving.
        registry: endpoints that deployments announce; None: those of the settings alone.
    """

    def __init__(self, settings: ServingSettings, registry: EndpointRegistry | None = None) -> None:
        self.settings = settings
        self.upstreams = Upstreams(settings, registry)
        self.limits = KeyLimits(
            streams=settings.streams_per_key, tokens_per_minute=settings.tokens_per_minute
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._caller: Caller | None = None
        self._shadow: Shadow | None = None
        self._leaving = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Connections are open, and servers are watched, until the block ends."""
        self._loop = asyncio.get_running_loop()
        async with open_session(self.settings) as session:
            self._caller = Caller(session, self.settings)
            self._shadow = Shadow(self.settings, self.upstreams, self._caller)
            await self.upstreams.refresh(session)
            watching = asyncio.create_task(self.upstreams.watch(session))
            watching.add_done_callback(_watch_ended)
            try:
                yield
            finally:
                watching.cancel()
                with suppress(asyncio.CancelledError):
                    await watching
                await self._shadow.stop()
                self._caller = self._shadow = None

    @property
    def caller(self) -> Caller:
        """Makes calls. Raises UpstreamUnavailable (`not-ready`) while nothing runs."""
        if self._caller is None or self._leaving:
            raise UpstreamUnavailable("this server is leaving", code="not-ready", retry_after_s=1.0)
        return self._caller

    @property
    def shadow(self) -> Shadow | None:
        """Asks baselines, while something runs."""
        return self._shadow

    def leave(self) -> None:
        """The process is asked to stop: no new requests, and streams end after the grace. May be
        called from anywhere, a signal handler above all.
        """
        self._leaving = True
        if self._loop is not None and not self._loop.is_closed():
            loop, grace_s = self._loop, self.settings.grace_s
            loop.call_soon_threadsafe(loop.call_later, grace_s, self._end_calls)

    def _end_calls(self) -> None:
        if self._caller is not None:
            self._caller.end(UpstreamUnavailable("this server is leaving", code="not-ready"))


def _watch_ended(watching: asyncio.Task[None]) -> None:
    if not watching.cancelled() and (error := watching.exception()) is not None:
        get_logger().error("endpoints.watch_crashed", exc_info=error)


def get_serving(request: Request) -> Serving:
    """The live serving of the running application."""
    serving: Serving = request.app.state.serving
    return serving
