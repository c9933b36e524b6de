"""An evaluation item on its way: one question at all budgets and sample numbers, asked, answered
and graded. Frozen, JSON both ways.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Literal, Self

from pydantic import Field, JsonValue, model_validator

from asap.eval_config import EvalConfig, Extraction, benchmark_of
from asap.grades import Grade
from asap.problems import Problem, ProblemRef, Sample
from asap.types import Frozen

__all__ = [
    "EvalData",
    "EvalItem",
    "GradedSample",
    "Machines",
    "differing_data",
    "tasks_expected",
]


class GradedSample(Frozen):
    """The grade of one completion by one benchmark's tests, with its code taken one way."""

    benchmark: str
    budget: int
    number: int
    """With `budget`: which of the item's samples."""
    extraction: Extraction
    grade: Grade


class EvalData(Frozen):
    """What a benchmark's problems were read from."""

    sha256: str
    """Of the lines of its files."""
    tasks: int
    """Asked in this run."""


class EvalItem(Frozen):
    """The payload of an evaluation item: stage `generate` adds `samples`, `grade` adds `grades`."""

    kind: Literal["evaluate"] = "evaluate"
    version: Literal[1] = 1
    id: str = Field(pattern=r"^[0-9a-f]{32}$")
    """Of the job."""
    tenant: str
    config: EvalConfig
    model: str
    """`name@version` of the registry, or the name by which a server knows it."""
    model_prefix: str | None = None
    """Of a registered model's files in the blob store."""
    model_sha256: str | None = None
    """Of the manifest of these files."""
    data: dict[str, EvalData] = Field(default_factory=dict)
    """By benchmark, for all of the run: the same in each of its items."""
    problems: tuple[Problem | ProblemRef, ...] = Field(min_length=1)
    """One question with one or more sets of tests, as HumanEval and HumanEval+ have: all samples
    are graded by all of them.
    """
    samples: tuple[Sample, ...] = ()
    grades: tuple[GradedSample, ...] = ()
    engine: dict[str, str] = Field(default_factory=dict)
    """The server that answered last, in its own words and ours."""
    sandbox: dict[str, str] = Field(default_factory=dict)
    """Where programs ran last: level, kernel, versions and limits."""

    @model_validator(mode="after")
    def _one_question(self) -> Self:
        if len({problem.prompt for problem in self.problems}) > 1:
            raise ValueError("the problems of an item ask the same question")
        if len({problem.benchmark for problem in self.problems}) < len(self.problems):
            raise ValueError("the problems of an item are of different benchmarks")
        if (self.model_prefix is None) != (self.model_sha256 is None):
            raise ValueError("a registered model has both a prefix and a hash")
        if len({self.config.budgets_of(problem.benchmark) for problem in self.problems}) > 1:
            raise ValueError("the problems of an item have the same budgets")
        keys = {(sample.budget, sample.number) for sample in self.samples}
        if len(keys) < len(self.samples):
            raise ValueError("two samples of an item have the same budget and number")
        if any((grade.budget, grade.number) not in keys for grade in self.grades):
            raise ValueError("a grade of an item is of no sample")
        return self

    @property
    def budgets(self) -> tuple[int, ...]:
        """Those of its benchmarks, which have the same."""
        return self.config.budgets_of(self.problems[0].benchmark)

    @property
    def prompt(self) -> str:
        """The question."""
        return self.problems[0].prompt

    def grown(self, **fields: object) -> Self:
        """A copy with these fields, checked."""
        own = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self).model_validate({**own, **fields})


class Machines:
    """The engines and sandboxes that a run's items met, each once."""

    def __init__(self, items: Iterable[EvalItem] = ()) -> None:
        self._engines: set[str] = set()
        self._sandboxes: set[str] = set()
        for item in items:
            self.add(item)

    def add(self, item: EvalItem) -> None:
        """One more item."""
        for facts, found in ((item.engine, self._engines), (item.sandbox, self._sandboxes)):
            if facts:
                found.add(json.dumps(facts, sort_keys=True))

    def told(self) -> dict[str, JsonValue]:
        """As a report says it; the same in whatever order items came."""
        return {
            "engines": [json.loads(text) for text in sorted(self._engines)],
            "sandboxes": [json.loads(text) for text in sorted(self._sandboxes)],
        }


def tasks_expected(items: Iterable[EvalItem]) -> dict[str, int]:
    """Tasks of each benchmark: of a known one all that it has, else what the run was asked."""
    return {
        name: benchmark_of(name).tasks or data.tasks
        for item in items
        for name, data in item.data.items()
    }


def differing_data(runs: Iterable[EvalItem]) -> tuple[str, ...]:
    """Benchmarks that not all of these runs were asked from the same files; one item of each."""
    hashes: dict[str, set[str]] = {}
    for item in runs:
        for name, data in item.data.items():
            hashes.setdefault(name, set()).add(data.sha256)
    return tuple(name for name, found in hashes.items() if len(found) > 1)
