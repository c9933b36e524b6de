"""/jobs: submit many triples, follow them, read their results while they come, cancel, retry,
delete.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Annotated

from fastapi import APIRouter, Depends, Form, Query, Request, Response, UploadFile
from fastapi.responses import JSONResponse, StreamingResponse

from asap_gateway.auth import Caller, Principal
from asap_gateway.errors import PROBLEM_RESPONSES
from asap_gateway.idempotency import idempotency_key
from asap_gateway.schemas import ItemPage, JobBody, JobPage, JobRequest
from asap_gateway.service import Gateway, get_gateway
from asap_gateway.upload import parse_options, submit_upload
from asap_runtime.layouts import Layout, to_row
from asap_runtime.tables import ItemStatus

__all__ = ["router"]

router = APIRouter(prefix="/jobs", tags=["jobs"], responses=PROBLEM_RESPONSES)
TheGateway = Annotated[Gateway, Depends(get_gateway)]
Cursor = Annotated[
    str | None,
    Query(pattern=r"^\d{1,18}\.[0-9a-f]{32}$", description="`next_cursor` of the page before"),
]
Limit = Annotated[int, Query(ge=1, le=500)]


@router.post("", status_code=202, response_model=JobBody)
async def submit_job(
    body: JobRequest, request: Request, caller: Caller, gateway: TheGateway
) -> JSONResponse:
    """Submit triples given in the body."""
    job_id = await asyncio.to_thread(
        gateway.submissions.submit,
        caller.tenant,
        body.triples or [],
        body,
        idempotency_key(request),
    )
    return await _accepted(gateway, request, caller, job_id)


@router.post("/upload", status_code=202, response_model=JobBody)
async def upload_job(
    file: UploadFile,
    request: Request,
    caller: Caller,
    gateway: TheGateway,
    options: Annotated[str, Form(max_length=10_000, description="JobOptions as JSON")] = "{}",
) -> JSONResponse:
    """Submit a JSONL, JSONL.gz or Parquet file; a line that cannot be used is a failed item."""
    given = parse_options(options)
    job_id = await asyncio.to_thread(submit_upload, gateway, caller.tenant, file, given)
    return await _accepted(gateway, request, caller, job_id)


async def _accepted(
    gateway: Gateway, request: Request, caller: Principal, job_id: str
) -> JSONResponse:
    view = await asyncio.to_thread(gateway.job, caller.tenant, job_id)
    location = request.url_for("get_job", job_id=job_id).path
    return JSONResponse(view.model_dump(mode="json"), 202, headers={"Location": location})


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


@router.get("/{job_id}/result", response_class=StreamingResponse)
async def get_result(
    job_id: str, caller: Caller, gateway: TheGateway, layout: Layout = "record"
) -> StreamingResponse:
    """Finished records as JSON lines in input order, also while the job runs."""
    await asyncio.to_thread(gateway.job, caller.tenant, job_id)

    def lines() -> Iterator[str]:
        for record in gateway.records(caller.tenant, job_id):
            yield json.dumps(to_row(record, layout), ensure_ascii=False) + "\n"

    return StreamingResponse(lines(), media_type="application/x-ndjson")


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
