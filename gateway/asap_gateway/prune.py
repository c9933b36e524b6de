"""POST /prune: a job of one, and a bounded wait for it."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from asap.types import Record
from asap_gateway.auth import Caller
from asap_gateway.errors import PROBLEM_RESPONSES, problem_response
from asap_gateway.idempotency import idempotency_key
from asap_gateway.json_body import JsonRoute
from asap_gateway.schemas import JobBody, PruneRequest
from asap_gateway.service import Gateway, get_gateway

__all__ = ["router"]

router = APIRouter(tags=["prune"], route_class=JsonRoute)


@router.post(
    "/prune",
    responses={
        202: {"model": JobBody, "description": "Not ready: see Location"},
        **PROBLEM_RESPONSES,
    },
    response_model=Record,
)
async def prune(
    body: PruneRequest,
    request: Request,
    caller: Caller,
    gateway: Annotated[Gateway, Depends(get_gateway)],
) -> Response:
    """Prune one triple. 200 with the record within `wait_s`, else 202 and the job's Location."""
    tenant = caller.tenant
    key = idempotency_key(request)
    with gateway.precedence.live():
        job_id = await asyncio.to_thread(
            gateway.submissions.prune, tenant, body.triple, body.config, key
        )
        outcome = await gateway.waits.result(tenant, job_id, body.wait_s)
    job = {"Location": request.url_for("get_job", job_id=job_id).path}
    if outcome is None:
        view = await asyncio.to_thread(gateway.job, tenant, job_id)
        return JSONResponse(view.model_dump(mode="json"), status_code=202, headers=job)
    if outcome.payload is None:
        return problem_response(request, outcome.problem)
    return Response(outcome.payload, media_type="application/json", headers=job)
