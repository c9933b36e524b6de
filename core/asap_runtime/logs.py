"""Logs: one JSON line for each event, those of libraries among them.

Events are `noun.verb_past` with fields in snake_case and units; identifiers are bound once, by the
runner. No question, CoT, answer or key ever gets here: lengths and hashes only.
"""

from __future__ import annotations

import logging
import sys
import traceback
from contextlib import suppress
from pathlib import Path

import structlog
from opentelemetry import trace

from asap_runtime.settings import TelemetrySettings

__all__ = ["configure_logs", "get_logger"]


def configure_logs(settings: TelemetrySettings) -> None:
    """JSON lines on stderr, or colours where somebody watches; warnings of libraries among them."""
    as_json = settings.log_json if settings.log_json is not None else not sys.stderr.isatty()
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _in_which_trace,
            _where_it_failed,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            getattr(logging, settings.log_level.upper())
        ),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    logging.root.handlers = [
        *(h for h in logging.root.handlers if not isinstance(h, _LibraryLines)),
        _LibraryLines(logging.WARNING),
    ]


class _LibraryLines(logging.Handler):
    """What libraries log, as a line of ours: their tracebacks and further lines quote values."""

    def emit(self, record: logging.LogRecord) -> None:
        first_line = record.getMessage().strip().partition("\n")[0]
        error = record.exc_info[1] if record.exc_info else None
        with suppress(OSError, ValueError):  # stderr is closed: there is nobody to tell
            get_logger().log(
                record.levelno,
                "library.logged",
                logger=record.name,
                said=first_line,
                exc_info=error,
            )


def _in_which_trace(
    logger: object, method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = trace.format_trace_id(context.trace_id)
    return event


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
