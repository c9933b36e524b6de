"""Jobs whose items are made in the background, after the request was answered."""

from __future__ import annotations

from asap_gateway.schemas import PRIORITIES, EvaluateRequest, TrainRequest
from asap_runtime.ingest import Ingester
from asap_runtime.intake import JobIntake, Source
from asap_runtime.telemetry import span, trace_parent

__all__ = ["create_in_background"]


def create_in_background(
    intake: JobIntake,
    ingester: Ingester,
    tenant: str,
    request: TrainRequest | EvaluateRequest,
    source: Source,
    key: str | None,
) -> str:
    """The id of a new job that the ingester takes in from `source`. Blocking."""
    with span("submit"):
        job_id = intake.create_job(
            tenant,
            request.kind,
            request.config.model_dump(mode="json"),
            PRIORITIES[request.priority],
            expires_in_s=request.deadline_s,
            idempotency_key=key,
            trace=trace_parent(),
            webhook=request.webhook,
            source=source,
        )
    ingester.wake()
    return job_id
