"""GET /jobs/{id}/events: progress as server-sent events, until the job ends."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header
from sse_starlette import EventSourceResponse, ServerSentEvent

from asap_gateway.auth import Caller
from asap_gateway.errors import PROBLEM_RESPONSES
from asap_gateway.schemas import JobBody
from asap_gateway.service import Gateway, get_gateway
from asap_runtime.tables import FINAL

__all__ = ["router"]

router = APIRouter(prefix="/jobs", tags=["jobs"], responses=PROBLEM_RESPONSES)

PERIOD_S = 0.5


@router.get("/{job_id}/events", response_class=EventSourceResponse)
async def follow_job(
    job_id: str,
    caller: Caller,
    gateway: Annotated[Gateway, Depends(get_gateway)],
    last_event_id: Annotated[str | None, Header()] = None,
) -> EventSourceResponse:
    """`progress` whenever counts change, or the progress of a training run, with items per second
    and the time left; then `end`.

    Each event is the whole state and its id is a hash of it: a client that comes back with
    Last-Event-ID gets the next change, and has missed nothing that matters.
    """
    first = await asyncio.to_thread(gateway.job, caller.tenant, job_id)
    return EventSourceResponse(_events(gateway, caller.tenant, first, last_event_id))


async def _events(
    gateway: Gateway, tenant: str, job: JobBody, seen: str | None
) -> AsyncIterator[ServerSentEvent]:
    started, done_before = time.monotonic(), _finished(job)
    while True:
        ended = job.finished_at is not None  # an expired job may still have running items
        done = _finished(job)
        key = _key(job)
        if key != seen or ended:
            rate = (done - done_before) / max(time.monotonic() - started, 1e-3)
            data = job.model_dump(mode="json", exclude={"config"}) | {
                "finished_items": done,
                "items_per_s": round(rate, 3),
                "eta_s": round((job.total - done) / rate, 1) if rate > 0 else None,
            }
            yield ServerSentEvent(json.dumps(data), event="end" if ended else "progress", id=key)
            seen = key
        if ended:
            return
        await asyncio.sleep(PERIOD_S)
        job = await asyncio.to_thread(gateway.job, tenant, job.id)


def _key(job: JobBody) -> str:
    """The same as long as nothing moved."""
    state = job.model_dump_json(include={"phase", "counts", "train"})
    return hashlib.sha256(state.encode()).hexdigest()[:16]


def _finished(job: JobBody) -> int:
    return sum(count.items for count in job.counts if count.status in FINAL)
