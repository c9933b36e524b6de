"""How long answers take, by route: the measure of the service levels."""

from __future__ import annotations

from time import perf_counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asap_runtime.telemetry import HTTP_SECONDS

__all__ = ["HttpMetrics"]

UNKNOWN_ROUTE = "unknown"
"""One label for all paths that are no route: callers must not be able to make labels."""


class HttpMetrics:
    """ASGI middleware, to stand before all others: refusals are answers, too.

    An answer that streams is measured until it begins; a crash counts as 500.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and observe when its answer begins."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, answered = perf_counter(), False

        def observe(status: int) -> None:
            route = getattr(scope.get("route"), "path", UNKNOWN_ROUTE)
            HTTP_SECONDS.labels(route, str(status)).observe(perf_counter() - started)

        async def watched(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start" and not answered:
                answered = True
                observe(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            if not answered:
                observe(500)
            raise
