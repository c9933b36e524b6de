"""The application: routers, problem handlers, limits; wired from what it is given, nothing at
import.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from fastapi import FastAPI

from asap_gateway import events, jobs, models, operations, prune, reports
from asap_gateway.audit import Audit
from asap_gateway.auth import Authentication
from asap_gateway.body_limit import BodyLimit
from asap_gateway.description import describe_api
from asap_gateway.errors import install_handlers
from asap_gateway.idempotency import Idempotency
from asap_gateway.live import proxy
from asap_gateway.live.serving import Serving
from asap_gateway.live.settings import ServingSettings
from asap_gateway.metrics import HttpMetrics
from asap_gateway.rate_limit import RateLimit
from asap_gateway.service import Gateway
from asap_runtime.keys import KeyRing

__all__ = ["create_app"]

DESCRIPTION = (
    "Compress chains of thought: anchor-guided pruning, then first-token surprisal. Train models "
    "on what is left."
)


def create_app(
    gateway: Gateway,
    *,
    keys: KeyRing | None = None,
    serving: Serving | None = None,
    running: Callable[[], AbstractAsyncContextManager[Any]] | None = None,
) -> FastAPI:
    """The gateway's application.

    Args:
        gateway: what the routes call.
        keys: who may call; None lets everybody in, for a server of this machine alone.
        serving: answers below /v1; None serves no models.
        running: entered while the application runs, such as the stages of the embedded process.
    """
    live = serving or Serving(ServingSettings())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with gateway.submissions.ingester:
            async with live.running():
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
    app.state.gateway, app.state.serving = gateway, live
    install_handlers(app)
    app.include_router(prune.router)
    app.include_router(jobs.router)
    app.include_router(events.router)
    app.include_router(reports.router)
    app.include_router(models.router)
    app.include_router(proxy.router)
    app.include_router(operations.router)

    describe_api(app)
    # The one added last stands first: nothing of a body is read before its sender is known.
    limits = gateway.limits
    app.add_middleware(Audit, trail=gateway.audit)
    app.add_middleware(Idempotency, gateway=gateway)
    app.add_middleware(BodyLimit, limits=limits)
    app.add_middleware(RateLimit, rate_per_s=limits.requests_per_s, burst=limits.request_burst)
    app.add_middleware(Authentication, keys=keys)
    app.add_middleware(HttpMetrics)
    return app
