"""/jobs: submit many triples, follow them, read their results while they come, cancel, retry,
delete.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from asap.errors import InvalidInput
from asap_gateway.auth import Caller
from asap_gateway.errors import PROBLEM_RESPONSES
from asap_gateway.evaluation_schemas import EvaluateEstimateBody
from asap_gateway.idempotency import idempotency_key
from asap_gateway.json_body import JsonRoute
from asap_gateway.schemas import (
    EstimateBody,
    EvaluateRequest,
    ItemPage,
    JobBody,
    JobPage,
    JobRequest,
    Submission,
    TrainEstimateBody,
    TrainRequest,
)
from asap_gateway.service import Gateway, get_gateway
from asap_gateway.upload import UPLOAD_BODY, accepted, take_upload
from asap_runtime.layouts import Format, Layout, in_chunks
from asap_runtime.tables import ItemStatus

__all__ = ["router"]

MEDIA_TYPES: Final[dict[Format, str]] = {
    "jsonl": "application/x-ndjson",
    "parquet": "application/vnd.apache.parquet",
}

AnyEstimate = EstimateBody | TrainEstimateBody | EvaluateEstimateBody
ESTIMATED: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "model": AnyEstimate,
        "description": "The estimate of a `dry_run`",
    }
}
UPLOAD_ESTIMATED: Final[dict[int | str, dict[str, Any]]] = {
    200: {"model": EstimateBody, "description": "The estimate of a `dry_run`"}
}

router = APIRouter(
    prefix="/jobs", tags=["jobs"], responses=PROBLEM_RESPONSES, route_class=JsonRoute
)
TheGateway = Annotated[Gateway, Depends(get_gateway)]
Cursor = Annotated[
    str | None,
    Query(pattern=r"^\d{1,18}\.[0-9a-f]{32}$", description="`next_cursor` of the page before"),
]
Limit = Annotated[int, Query(ge=1, le=500)]


@router.post("", status_code=202, response_model=JobBody, responses=ESTIMATED)
async def submit_job(
    body: Submission, request: Request, caller: Caller, gateway: TheGateway
) -> JSONResponse:
    """Submit triples given in the body, a data set of the server's blob store, or the scores of an
    ended job; or, as `kind` train, a model to be trained, as `kind` evaluate, one to be asked
    benchmarks. With `dry_run` 200 and an estimate.
    """
    tenant, key = caller.tenant, idempotency_key(request)
    taken = await asyncio.to_thread(_take, gateway, tenant, body, key)
    if not isinstance(taken, str):
        return JSONResponse(taken.model_dump(mode="json"))
    return await asyncio.to_thread(accepted, gateway, tenant, request, taken)


def _take(
    gateway: Gateway,
    tenant: str,
    body: JobRequest | TrainRequest | EvaluateRequest,
    key: str | None,
) -> str | AnyEstimate:
    """The id of the new job, or the estimate of a `dry_run`. Blocking."""
    if isinstance(body, TrainRequest):
        if body.dry_run:
            return gateway.training.estimate(tenant, body)
        gateway.submissions.admit(tenant, 1)
        return gateway.training.submit(tenant, body, key)
    if isinstance(body, EvaluateRequest):
        if body.dry_run:
            return gateway.evaluations.estimate(tenant, body)
        gateway.submissions.admit(tenant, 1)
        return gateway.evaluations.submit(tenant, body, key)
    if body.dry_run:
        return gateway.submissions.estimate(tenant, body)
    return gateway.submissions.submit(tenant, body, key)


@router.post(
    "/upload",
    status_code=202,
    response_model=JobBody,
    responses=UPLOAD_ESTIMATED,
    openapi_extra=UPLOAD_BODY,
)
async def upload_job(request: Request, caller: Caller, gateway: TheGateway) -> Response:
    """Submit a JSONL, JSONL.gz or Parquet file; a line that cannot be used is a failed item."""
    return await take_upload(gateway, caller.tenant, request)


@router.get("", response_model=JobPage)
async def list_jobs(
    caller: Caller, gateway: TheGateway, cursor: Cursor = None, limit: Limit = 50
) -> JobPage:
    """Jobs, newest first, by cursor."""
    return await asyncio.to_thread(gateway.jobs, caller.tenant, cursor, limit)


@router.get("/{job_id}", response_model=JobBody)
async def get_job(job_id: str, caller: Caller, gateway: TheGateway) -> JobBody:
    """One job: its phase, and its items by stage and status."""
    return await asyncio.to_thread(gateway.job, caller.tenant, job_id)


@router.get("/{job_id}/items", response_model=ItemPage)
async def list_items(
    job_id: str,
    caller: Caller,
    gateway: TheGateway,
    cursor: Annotated[int | None, Query(ge=0, le=2**31 - 1)] = None,
    limit: Limit = 100,
    status: ItemStatus | None = None,
) -> ItemPage:
    """Items in input order, without their text."""
    return await asyncio.to_thread(gateway.items, caller.tenant, job_id, cursor, limit, status)


@router.get(
    "/{job_id}/result",
    response_class=StreamingResponse,
    responses={200: {"content": {media: {} for media in MEDIA_TYPES.values()}}},
)
async def get_result(
    request: Request,
    job_id: str,
    caller: Caller,
    gateway: TheGateway,
    layout: Layout = "record",
    format: Annotated[
        Format | None, Query(description="default: what Accept names, else jsonl")
    ] = None,
) -> StreamingResponse:
    """Finished records in input order, also while the job runs; of a training job its run, with
    `result`, once it has ended well; of an evaluation its questions with completions and grades.
    """
    chosen = format or _negotiated(request.headers.get("accept", ""))
    kind = await asyncio.to_thread(gateway.kind, caller.tenant, job_id)
    if kind == "prune":
        chunks = in_chunks(gateway.records(caller.tenant, job_id), layout, chosen)
    elif (layout, chosen) == ("record", "jsonl"):
        chunks = gateway.lines(caller.tenant, job_id)
    else:
        detail = (
            f"the result of a job of kind {kind} has the layout record and the format jsonl alone"
        )
        raise InvalidInput(detail, code="not-acceptable")
    return StreamingResponse(chunks, media_type=MEDIA_TYPES[chosen])


def _negotiated(accept: str) -> Format:
    named = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    for format, media_type in MEDIA_TYPES.items():
        if media_type in named:
            return format
    if not accept or any(name in ("*/*", "application/*") for name in named):
        return "jsonl"
    raise InvalidInput(f"a result is {' or '.join(MEDIA_TYPES.values())}", code="not-acceptable")


@router.post("/{job_id}/cancel", response_model=JobBody)
async def cancel_job(job_id: str, caller: Caller, gateway: TheGateway) -> JobBody:
    """Cancel; safe to repeat. What is done stays downloadable."""
    return await asyncio.to_thread(gateway.cancel, caller.tenant, job_id)


@router.post("/{job_id}/retry", response_model=JobBody)
async def retry_job(job_id: str, caller: Caller, gateway: TheGateway) -> JobBody:
    """Run the failed items again."""
    return await asyncio.to_thread(gateway.retry, caller.tenant, job_id)


@router.delete("/{job_id}", status_code=204)
async def delete_job(job_id: str, caller: Caller, gateway: TheGateway) -> Response:
    """Delete the job with its items and results."""
    await asyncio.to_thread(gateway.delete, caller.tenant, job_id)
    return Response(status_code=204)
