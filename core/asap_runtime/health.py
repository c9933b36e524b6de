"""A worker's own small server: whether it lives, whether it is ready, its metrics.

`/healthz` looks at this process alone, `/readyz` at what it needs. A full queue is no reason for
either: restarting or leaving out a busy worker only makes the queue longer.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Protocol, runtime_checkable

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from asap.errors import AsapError, Misconfigured
from asap_runtime.host import StageHost
from asap_runtime.http_problems import answer, problem
from asap_runtime.logs import get_logger
from asap_runtime.migrate import has_schema
from asap_runtime.problems import describe
from asap_runtime.telemetry import QUEUE_UP, SELF_MESSAGE_AGE_SECONDS

__all__ = ["Probed", "check_ready", "serve_worker", "worker_app"]

SELF_MESSAGE_LIMIT_S = 90.0
"""A message of the worker to itself takes milliseconds; one is sent every 10 s."""
LEAVE_S = 1
"""How long open connections may hold up the end of the process."""
_HTTP = {404: ("not-found", "Not found"), 405: ("method-not-allowed", "Method not allowed")}


@runtime_checkable
class Probed(Protocol):
    """A stage with a resource of its own that can break without an error at hand."""

    async def ready(self) -> None:
        """Raise AsapError when items would only fail here; quick, and safe to call often."""


async def check_ready(host: StageHost) -> None:
    """Raise AsapError unless database, schema and the stages' resources are there."""
    if not await asyncio.to_thread(has_schema, host.database.engine):
        raise AsapError("the database has an old schema", code="not-ready")
    for stage in host.stages:
        if isinstance(stage, Probed):
            await stage.ready()


def worker_app(host: StageHost, routes: Sequence[BaseRoute] = ()) -> Starlette:
    """Probes and metrics of the host's process, and further routes of its stages."""

    async def healthz(request: Request) -> Response:
        """The loop turns, and messages that the broker has do arrive."""
        age_s = host.queue.self_message_age_s()
        if age_s > SELF_MESSAGE_LIMIT_S and host.queue.healthy():
            detail = f"no message has come through for {age_s:.0f} s"
            return answer(request.url.path, problem(503, "not-ready", "Not alive", detail))
        return JSONResponse({"status": "ok", "self_message_age_s": round(age_s, 1)})

    async def readyz(request: Request) -> Response:
        """What the worker needs is there; the broker is a warning only."""
        if host.phase != "running":
            detail = f"this worker is {host.phase}"
            return answer(request.url.path, problem(503, "not-ready", "Not ready", detail))
        try:
            await check_ready(host)
        except AsapError as error:
            members = {**describe(error), "title": "Not ready", "status": 503}
            return answer(request.url.path, members)
        broker = "ok" if host.queue.healthy() else "not reachable"
        return JSONResponse({"status": "ok", "broker": broker})

    async def metrics(request: Request) -> Response:
        """Prometheus metrics of this process."""
        SELF_MESSAGE_AGE_SECONDS.set(host.queue.self_message_age_s())
        QUEUE_UP.set(host.queue.healthy())
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    own = [Route(f"/{probe.__name__}", probe) for probe in (healthz, readyz, metrics)]
    handlers = {HTTPException: _on_http, Exception: _on_crash}
    return Starlette(routes=[*own, *routes], exception_handlers=handlers)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code, title = _HTTP[error.status_code]
    refusal = answer(request.url.path, problem(error.status_code, code, title, error.detail))
    refusal.headers.update(error.headers or {})
    return refusal


async def _on_crash(request: Request, error: Exception) -> Response:
    get_logger().error("request.crashed", path=request.url.path, exc_info=error)
    return answer(request.url.path, describe(AsapError("an error of ours; the log has it")))


class _Server(uvicorn.Server):
    """Leaves the signals to the worker: it gives its items back before it stops to answer."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def serve_worker(app: Starlette, address: str, port: int) -> AsyncIterator[int]:
    """Serve the application on the running loop while the block runs; gives the port.

    Port 0 takes a free one. Enter the block before the stages start, so that a model that loads
    for minutes is seen to live. Raises Misconfigured when the port cannot be had.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        listener = socket.create_server((address, port), family=family)
    except OSError as error:
        raise Misconfigured(
            f"cannot listen on {address} port {port} ({error.strerror}); name another"
        ) from error
    server = _Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=LEAVE_S,
        )
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        with suppress(asyncio.CancelledError):
            await serving
