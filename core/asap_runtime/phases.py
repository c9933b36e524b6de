"""The phase of a job, derived from facts and counts, so that it cannot disagree with its items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from asap_runtime.tables import FINAL, ItemStatus

__all__ = ["JobFacts", "Phase", "StageCount", "count_of", "phase"]

Phase = Literal[
    "validating",
    "rejected",
    "queued",
    "running",
    "cancelling",
    "cancelled",
    "finalizing",
    "done",
    "expired",
]


@dataclass(frozen=True, slots=True)
class JobFacts:
    """What is persisted of a job's life, in microseconds since the epoch; None: not happened.

    `expires_at` is the deadline for its items, `now` the database's time when the facts were read.
    """

    created_at: int
    now: int
    ingested_at: int | None = None
    rejected_at: int | None = None
    cancelled_at: int | None = None
    expires_at: int | None = None
    finished_at: int | None = None


@dataclass(frozen=True, slots=True)
class StageCount:
    """How many items stand at one stage in one status. Stage None: no stage was needed."""

    stage: str | None
    status: ItemStatus
    items: int


def count_of(counts: Sequence[StageCount], *statuses: ItemStatus) -> int:
    """Items in any of these statuses, over all stages."""
    return sum(count.items for count in counts if count.status in statuses)


def phase(facts: JobFacts, counts: Sequence[StageCount]) -> Phase:
    """The one phase that facts and counts allow."""
    if facts.rejected_at is not None:
        return "rejected"
    if facts.cancelled_at is not None:
        return "cancelling" if count_of(counts, "running") else "cancelled"
    if facts.ingested_at is None:
        return "validating"
    end = facts.now if facts.finished_at is None else facts.finished_at
    if facts.expires_at is not None and end > facts.expires_at:
        return "expired"
    if facts.finished_at is not None:
        return "done"
    if not count_of(counts, "queued", "running"):
        return "finalizing"
    return "running" if count_of(counts, "running", *FINAL) else "queued"
