"""What a tenant reads of its jobs: a job, an item, a result, a summary. Values without a payload's
meaning; money is in micro-dollars.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import JsonValue

from asap_runtime.phases import JobFacts, Phase, StageCount, phase
from asap_runtime.tables import ItemStatus
from asap_runtime.values import ItemProblem

__all__ = ["ErrorSummary", "ItemView", "JobView", "Result"]


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as its tenant sees it. `cursor` is the place in `jobs()`."""

    id: str
    kind: str
    config: Mapping[str, JsonValue]
    priority: int
    facts: JobFacts
    counts: tuple[StageCount, ...]
    problems: tuple[ItemProblem, ...]
    cost: int
    cost_cap: int | None
    webhook: str | None
    cursor: str

    @property
    def phase(self) -> Phase:
        """Derived from facts and counts."""
        return phase(self.facts, self.counts)


@dataclass(frozen=True, slots=True)
class ItemView:
    """An item without its payload. Its position is its cursor in `items()`."""

    position: int
    line: int
    custom_id: str | None
    stage: str | None
    status: ItemStatus
    attempt: int
    cost: int
    problem: ItemProblem | None


@dataclass(frozen=True, slots=True)
class Result:
    """How one input line ended: the payload of a succeeded item, the problem of any other."""

    position: int
    line: int
    custom_id: str | None
    status: ItemStatus
    payload: bytes | None
    problem: ItemProblem | None


@dataclass(frozen=True, slots=True)
class ErrorSummary:
    """One problem code of a job: how many items, and the first input line with what it says."""

    code: str
    items: int
    first_line: int
    detail: str
