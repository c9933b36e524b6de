"""The application: routers, problem handlers, limits; wired from what it is given, nothing at
import.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from asap_gateway import events, jobs, prune
from asap_gateway.body_limit import BodyLimit
from asap_gateway.errors import install_handlers
from asap_gateway.idempotency import Idempotency
from asap_gateway.service import Gateway

__all__ = ["create_app"]

DESCRIPTION = "Compress chains of thought: anchor-guided pruning, then first-token surprisal."


def create_app(
    gateway: Gateway, *, running: Callable[[], AbstractAsyncContextManager[Any]] | None = None
) -> FastAPI:
    """The gateway's application.

    Args:
        gateway: what the routes call.
        running: entered while the application runs, such as the stages of the embedded process.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if running is None:
            yield
            return
        async with running():
            yield

    app = FastAPI(
        title="ASAP",
        version="0.1.0",
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.gateway = gateway
    install_handlers(app)
    app.include_router(prune.router)
    app.include_router(jobs.router)
    app.include_router(events.router)

    @app.get("/healthz", tags=["operations"])
    async def healthz() -> dict[str, str]:
        """The loop turns."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["operations"])
    async def readyz() -> JSONResponse:
        """The database answers; the broker is a warning only."""
        await asyncio.to_thread(gateway.check_database)
        broker = "ok" if gateway.queue.healthy() else "not reachable"
        return JSONResponse({"status": "ok", "broker": broker})

    @app.get("/metrics", tags=["operations"], response_class=Response)
    async def metrics() -> Response:
        """Prometheus metrics of this process."""
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    # the one added last stands first: sizes are checked before keys are looked at
    app.add_middleware(Idempotency, gateway=gateway)
    app.add_middleware(BodyLimit, limits=gateway.limits)
    return app
