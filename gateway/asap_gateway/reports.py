"""GET /jobs/{id}/report and /reports/compare: what evaluations came to, as JSON or Markdown."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Depends, Query, Response

from asap.errors import InvalidInput
from asap.report import Report
from asap.report_markdown import render_markdown
from asap_gateway.auth import Caller
from asap_gateway.errors import PROBLEM_RESPONSES
from asap_gateway.schemas import JOB_ID
from asap_gateway.service import Gateway, get_gateway

__all__ = ["router"]

router = APIRouter(tags=["reports"], responses=PROBLEM_RESPONSES)
TheGateway = Annotated[Gateway, Depends(get_gateway)]
Form = Annotated[Literal["json", "markdown"], Query()]
Partial = Annotated[bool, Query(description="also while a job runs, of what is done")]
JobId = Annotated[str, Query(pattern=JOB_ID)]
MARKDOWN: Final = "text/markdown"
REPORTED: Final[dict[int | str, dict[str, Any]]] = {
    200: {"model": Report, "content": {MARKDOWN: {"schema": {"type": "string"}}}}
}


@router.get("/jobs/{job_id}/report", responses=REPORTED)
async def get_report(
    job_id: str,
    caller: Caller,
    gateway: TheGateway,
    format: Form = "json",
    partial: Partial = False,
) -> Response:
    """The report of an evaluation; 409 while it runs, unless `partial`."""
    reports = gateway.reports
    report = await asyncio.to_thread(reports.report, caller.tenant, job_id, partial=partial)
    return _answer(report, format)


@router.get("/reports/compare", responses=REPORTED)
async def compare_jobs(
    caller: Caller,
    gateway: TheGateway,
    job: Annotated[list[JobId], Query(min_length=2, max_length=8)],
    format: Form = "json",
    partial: Partial = False,
) -> Response:
    """Two to eight evaluations side by side: the first one's model against each of the others',
    with paired tests on the tasks that both were scored on.
    """
    if len(set(job)) < len(job):
        detail = "a job is named twice"
        raise InvalidInput(detail, errors=[{"pointer": "/job", "detail": detail}])
    reports = gateway.reports
    report = await asyncio.to_thread(reports.compare, caller.tenant, job, partial=partial)
    return _answer(report, format)


def _answer(report: Report, format: Literal["json", "markdown"]) -> Response:
    if format == "markdown":
        return Response(render_markdown(report), media_type=MARKDOWN)
    return Response(report.to_json(), media_type="application/json")
