"""Logs, metrics and traces: the only file that spells their names.

Events are `noun.verb_past` with fields in snake_case and units; identifiers are bound once, by the
runner. No question, CoT, answer or key ever gets here: lengths and hashes only. Metric labels are
bounded.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog
from opentelemetry import propagate, trace
from prometheus_client import Counter, Gauge, Histogram

from asap_runtime.settings import TelemetrySettings

__all__ = [
    "ITEMS",
    "QUEUE_ITEMS",
    "QUEUE_WAIT_SECONDS",
    "REPUBLISHED",
    "STAGE_SECONDS",
    "STALE_WRITES",
    "configure_logs",
    "get_logger",
    "span",
    "trace_context",
]

_SECONDS = (0.005, 0.02, 0.1, 0.5, 2, 10, 60, 300, 1800)

ITEMS = Counter("asap_items", "Items that left a stage", ["stage", "outcome"])
STAGE_SECONDS = Histogram("asap_stage_seconds", "Time in a stage", ["stage"], buckets=_SECONDS)
QUEUE_WAIT_SECONDS = Histogram(
    "asap_queue_wait_seconds", "From due to claimed", ["stage"], buckets=_SECONDS
)
QUEUE_ITEMS = Gauge("asap_queue_items", "Due and running items: the scaling signal", ["stage"])
STALE_WRITES = Counter("asap_stale_writes", "Writes refused by their fence", ["stage"])
REPUBLISHED = Counter("asap_republished", "Items published by the sweeper", ["stage"])
BATCH_TOKENS = Histogram(
    "asap_batch_tokens", "Tokens of a scoring batch", buckets=(512, 2048, 4096, 8192, 16384, 65536)
)
BATCH_ROWS = Histogram(
    "asap_batch_rows", "Requests in a scoring batch", buckets=(1, 2, 4, 8, 16, 64)
)

_tracer = trace.get_tracer("asap")


def configure_logs(settings: TelemetrySettings) -> None:
    """JSON lines on stderr, or colours where somebody watches."""
    as_json = settings.log_json if settings.log_json is not None else not sys.stderr.isatty()
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _where_it_failed,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            getattr(logging, settings.log_level.upper())
        ),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def _where_it_failed(
    logger: object, method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """An exception as its class and the lines it came through. Its message may quote a trace."""
    error = event.pop("exc_info", None)
    if error is True:
        error = sys.exc_info()[1]
    if isinstance(error, BaseException):
        frames = traceback.extract_tb(error.__traceback__)
        event["error"] = type(error).__name__
        event["frames"] = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames]
    return event


def get_logger() -> structlog.typing.FilteringBoundLogger:
    """The process's logger."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return logger


@contextmanager
def span(
    name: str, carrier: dict[str, str] | None = None, **attributes: str | int
) -> Iterator[None]:
    """A trace span; `carrier` is the context that rode in a message."""
    context = propagate.extract(carrier) if carrier else None
    with _tracer.start_as_current_span(name, context=context, attributes=attributes):
        yield


def trace_context() -> dict[str, str]:
    """The current trace context, to ride in a message."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier
