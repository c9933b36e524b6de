"""The one table from error class to title, exit code and HTTP status. The core knows codes only.

Exit codes are those of sysexits(3): 65 data, 66 no input, 69 unavailable, 70 internal, 75 try
again, 77 no permission, 78 configuration; 130 after Ctrl-C.
"""

from __future__ import annotations

from dataclasses import dataclass

from asap.errors import (
    AsapError,
    CapacityError,
    CoarseExhausted,
    Conflict,
    CostCapReached,
    Forbidden,
    InvalidInput,
    Misconfigured,
    NotFound,
    Overloaded,
    StorageFull,
    TrainingFailed,
    Unauthorized,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from asap_runtime.values import ItemProblem

__all__ = ["INTERRUPTED", "PROBLEMS", "Problem", "describe", "item_problem", "problem_of"]

INTERRUPTED = 130
_SHOWN = frozenset({"retry_after_s", "line", "field", "errors", "reason", "log"})
"""Context that callers see; the rest is for logs."""


@dataclass(frozen=True, slots=True)
class Problem:
    """How one class of error is shown."""

    title: str
    exit_code: int
    status: int


PROBLEMS: dict[type[AsapError], Problem] = {
    AsapError: Problem("Internal error", 70, 500),
    InvalidInput: Problem("Invalid input", 65, 422),
    Unauthorized: Problem("Unauthorized", 77, 401),
    Forbidden: Problem("Forbidden", 77, 403),
    CostCapReached: Problem("Cost cap reached", 65, 402),
    NotFound: Problem("Not found", 66, 404),
    Conflict: Problem("Conflict", 65, 409),
    Overloaded: Problem("Overloaded", 75, 429),
    CoarseExhausted: Problem("No valid coarse CoT", 65, 502),
    TrainingFailed: Problem("Training failed", 70, 500),
    UpstreamError: Problem("The LLM server's answer cannot be used", 69, 502),
    UpstreamTimeout: Problem("The LLM server did not answer in time", 69, 504),
    UpstreamUnavailable: Problem("The LLM server is not available", 69, 503),
    CapacityError: Problem("Out of memory", 75, 503),
    StorageFull: Problem("Insufficient storage", 75, 507),
    Misconfigured: Problem("Misconfigured", 78, 500),
}


_STATUS = {
    "malformed-json": 400,
    "invalid-utf8": 400,
    "not-acceptable": 406,
    "payload-too-large": 413,
    "too-many-items": 413,
    "decompression-limit": 413,
    "unsupported-media-type": 415,
}
"""Codes of InvalidInput whose HTTP status says more than that of the class."""


def problem_of(error: AsapError) -> Problem:
    """The row of the error's class; a class without a row fails the tests."""
    return PROBLEMS[type(error)]


def item_problem(error: AsapError) -> ItemProblem:
    """The problem as it is stored on an item."""
    facts = {
        name: value
        for name, value in error.context.items()
        if name in _SHOWN and isinstance(value, str | int | float)
    }
    return ItemProblem(error.problem_code, error.detail, facts)


def describe(error: AsapError) -> dict[str, object]:
    """The problem as a caller sees it (RFC 9457 members)."""
    return {
        "type": f"urn:asap:problem:{error.problem_code}",
        "title": problem_of(error).title,
        "status": _STATUS.get(error.problem_code, problem_of(error).status),
        "detail": error.detail,
        "code": error.problem_code,
        **{name: value for name, value in error.context.items() if name in _SHOWN},
    }
