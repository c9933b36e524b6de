"""What a model is asked and what it answered: Problem, its tests, and Sample. Frozen, JSON both
ways.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import Literal, Self

from pydantic import Field, JsonValue, model_validator

from asap.types import Frozen

__all__ = ["CallCase", "Problem", "ProblemRef", "Sample", "StdinCase", "TestKind"]

TestKind = Literal["asserts", "call", "stdin"]


class CallCase(Frozen):
    """One call of the entry point."""

    args: tuple[JsonValue, ...]
    expected: JsonValue


class StdinCase(Frozen):
    """One run of the program."""

    input: str
    output: str


class Problem(Frozen):
    """One task of a benchmark. A program that solves it is
    `prelude`, the completion's code, then what `kind` says.
    """

    benchmark: str
    task_id: str
    prompt: str
    """The user message, whole; never holds the reference or a hidden test."""
    kind: TestKind
    """`asserts`: run `test`, which defines `check(candidate)`, then `check(entry_point)`. `call`:
    the value of `entry_point(*args)` is the expected one for each of `calls`. `stdin`: run once for
    each of `streams`.
    """
    entry_point: str | None = None
    """An expression such as `add` or `Solution().add`; None for `stdin`."""
    test: str | None = None
    calls: tuple[CallCase, ...] = ()
    streams: tuple[StdinCase, ...] = ()
    prelude: str = ""
    """Code that always stands before the program."""
    imports: tuple[str, ...] = ()
    """Import lines of the prompt, put before a program that lacks them."""
    reference: str | None = None
    """A whole program that passes, without `prelude`; never shown to a model."""
    time_limit_s: float = Field(gt=0)
    """Seconds: for all tests together (`asserts`), for each case (`call`, `stdin`)."""

    @model_validator(mode="after")
    def _tests_of_its_kind(self) -> Self:
        given = {"asserts": self.test, "call": self.calls, "stdin": self.streams}
        if {kind for kind, tests in given.items() if tests} != {self.kind}:
            raise ValueError(f"a problem of kind {self.kind!r} holds tests of that kind alone")
        if (self.entry_point is None) != (self.kind == "stdin"):
            raise ValueError("entry_point is given for asserts and call, and not for stdin")
        return self

    @cached_property
    def sha256(self) -> str:
        """Of the canonical JSON of all fields."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()


class ProblemRef(Frozen):
    """Stands for a problem whose tests are too large for a database row."""

    benchmark: str
    task_id: str
    prompt: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of the problem (`Problem.sha256`), checked by whoever loads it."""
    key: str
    """Of the problem's JSON in the blob store."""


class Sample(Frozen):
    """One completion of a problem. Times in seconds; the text as generated, without the prompt."""

    task_id: str
    number: int = Field(ge=0)
    """Counts the completions of one problem at one budget from 0."""
    budget: int = Field(ge=1)
    """Most tokens that could be generated, thinking and answer together."""
    text: str
    completion_tokens: int = Field(ge=0)
    """Generated tokens, the stop token included where the engine returns it."""
    reasoning_tokens: int | None = Field(None, ge=0)
    """Those before `</think>`; None where the engine does not say."""
    prompt_tokens: int = Field(ge=0)
    finish_reason: str
    """As the engine names it: `stop`, `length` and the like."""
    started_at: float
    """Seconds since the epoch."""
    seconds: float = Field(ge=0)
    """From the request to the last token."""
    ttft_s: float | None = Field(None, ge=0)
    """From the request to the first token; None when the answer was not streamed."""

    @property
    def truncated(self) -> bool:
        """Whether the budget ended the completion."""
        return self.finish_reason == "length"
