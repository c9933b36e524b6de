"""The one table from error class to title and exit code. The core knows codes only.

Exit codes are those of sysexits(3): 65 data, 66 no input, 69 unavailable, 70 internal, 75 try
again, 78 configuration; 130 after Ctrl-C.
"""

from __future__ import annotations

from dataclasses import dataclass

from asap.errors import (
    AsapError,
    CapacityError,
    CoarseExhausted,
    InvalidInput,
    Misconfigured,
    NotFound,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnavailable,
)

__all__ = ["INTERRUPTED", "PROBLEMS", "Problem", "problem_of"]

INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Problem:
    """How one class of error is shown."""

    title: str
    exit_code: int


PROBLEMS: dict[type[AsapError], Problem] = {
    AsapError: Problem("Internal error", 70),
    InvalidInput: Problem("Invalid input", 65),
    NotFound: Problem("Not found", 66),
    CoarseExhausted: Problem("No valid coarse CoT", 65),
    UpstreamError: Problem("The LLM server's answer cannot be used", 69),
    UpstreamTimeout: Problem("The LLM server did not answer in time", 69),
    UpstreamUnavailable: Problem("The LLM server is not available", 69),
    CapacityError: Problem("Out of memory", 75),
    Misconfigured: Problem("Misconfigured", 78),
}


def problem_of(error: AsapError) -> Problem:
    """The row of the error's class; a class without a row fails the tests."""
    return PROBLEMS[type(error)]
