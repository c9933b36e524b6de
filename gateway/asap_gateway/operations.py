"""What an operator asks of the process: whether it lives, whether it is ready, its metrics."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel

from asap_gateway.errors import PROBLEM_RESPONSES
from asap_gateway.service import Gateway, get_gateway
from asap_runtime.telemetry import QUEUE_UP

__all__ = ["router"]

router = APIRouter(tags=["operations"])
TheGateway = Annotated[Gateway, Depends(get_gateway)]


class Health(BaseModel):
    """A sign of life."""

    status: str = "ok"


class Readiness(Health):
    """Ready; the broker is a warning only."""

    broker: str


@router.get("/healthz")
async def healthz() -> Health:
    """The loop turns."""
    return Health()


@router.get("/readyz", responses={503: PROBLEM_RESPONSES[503]})
async def readyz(gateway: TheGateway) -> Readiness:
    """The database answers and has the schema that is needed, and the process is not leaving."""
    await asyncio.to_thread(gateway.check_ready)
    return Readiness(broker="ok" if gateway.queue.healthy() else "not reachable")


@router.get("/metrics", response_class=Response)
async def metrics(gateway: TheGateway) -> Response:
    """Prometheus metrics of this process."""
    QUEUE_UP.set(gateway.queue.healthy())
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
