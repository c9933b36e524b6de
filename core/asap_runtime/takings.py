"""Jobs whose lines stand in a stored file: one process at a time takes them in, under a lease.

Whoever holds the lease goes on after the last line that is in. Each batch checks the lease in its
own transaction, so that a process that was taken for dead writes nothing when it wakes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import JsonValue
from sqlalchemy import Connection, func, null, or_, select, update

from asap_runtime.database import Database, after, now
from asap_runtime.intake import (
    LEASE_S,
    REPORTED_LINES,
    JobIntake,
    Source,
    StoredLines,
    source_from_json,
    takes_items,
)
from asap_runtime.tables import items, jobs
from asap_runtime.values import ItemProblem, NewItem

__all__ = ["Taking", "Takings"]


@dataclass(slots=True)
class Taking:
    """A job that this process takes in, as far as it has come.

    The lease is a token, too: the moment at which it ends, which no later holder has.
    """

    job_id: str
    tenant: str
    config: Mapping[str, JsonValue]
    priority: int
    source: Source
    lease: int
    line: int
    """The last input line that is in; 0 at first."""
    items: int
    bad: int
    """Lines that could not be used, among the items."""


class Takings:
    """The jobs that wait to be taken in. Blocking; safe to share between threads."""

    def __init__(self, database: Database, *, lease_s: float = LEASE_S) -> None:
        self._database, self._lease_s = database, lease_s
        self._intake = JobIntake(database)

    def take(self) -> Taking | None:
        """The most urgent job whose stored lines nobody takes in now; None: there is none."""
        free = (
            select(jobs.c.id)
            .where(
                jobs.c.source.is_not(None),
                jobs.c.finished_at.is_(None),
                takes_items(),
                or_(jobs.c.intake_until.is_(None), jobs.c.intake_until < now()),
            )
            .order_by(jobs.c.priority, jobs.c.created_at)
            .limit(1)
            .with_for_update(skip_locked=True)
        )
        with self._database.write() as connection:
            job_id = connection.execute(free).scalar_one_or_none()
            if job_id is None:
                return None
            leased = (
                update(jobs)
                .where(jobs.c.id == job_id)
                .values(intake_until=after(self._lease_s))
                .returning(
                    jobs.c.tenant,
                    jobs.c.config,
                    jobs.c.priority,
                    jobs.c.source,
                    jobs.c.intake_until,
                )
            )
            tenant, config, priority, source, lease = connection.execute(leased).one()
            line, number, bad = _progress(connection, job_id)
        return Taking(
            job_id,
            tenant,
            json.loads(config),
            priority,
            source_from_json(source),
            lease,
            line,
            number,
            bad,
        )

    def add(self, taking: Taking, batch: Sequence[NewItem]) -> None:
        """Append a batch and extend the lease. Raises InvalidInput (`job-finished`) once the job
        is stopped or the lease is another's.
        """
        lease = self._intake.add_batch(
            taking.job_id, batch, lease=taking.lease, lease_s=self._lease_s
        )
        assert lease is not None
        taking.lease, taking.line = lease, batch[-1].line
        taking.items += len(batch)
        taking.bad += sum(item.problem is not None for item in batch)

    def keep(self, taking: Taking) -> None:
        """Extend the lease while nothing is added. Raises InvalidInput as `add` does."""
        taking.lease = self._intake.extend(taking.job_id, taking.lease, self._lease_s)

    def finish(self, taking: Taking) -> bool:
        """All lines are in. False when the job was stopped before, or the lease is another's."""
        return self._intake.mark_ingested(taking.job_id, lease=taking.lease)

    def reject(self, taking: Taking, reason: ItemProblem) -> bool:
        """The file cannot be used; kept are the reason and the first bad lines. False as above."""
        problems = [reason, *self._bad_lines(taking.job_id)]
        return self._intake.reject(taking.job_id, problems, lease=taking.lease)

    def release(self, taking: Taking) -> None:
        """Give the lease back before its time."""
        with self._database.write() as connection:
            connection.execute(
                update(jobs)
                .where(jobs.c.id == taking.job_id, jobs.c.intake_until == taking.lease)
                .values(intake_until=null())
            )

    def needed(self) -> set[str]:
        """The keys of the stored files whose lines are not all in."""
        statement = select(jobs.c.source).where(
            jobs.c.source.is_not(None), jobs.c.finished_at.is_(None), takes_items()
        )
        with self._database.read() as connection:
            sources = map(source_from_json, connection.execute(statement).scalars())
            return {source.key for source in sources if isinstance(source, StoredLines)}

    def _bad_lines(self, job_id: str) -> list[ItemProblem]:
        statement = (
            select(items.c.line, items.c.problem)
            .where(items.c.job_id == job_id, items.c.status == "failed")
            .order_by(items.c.position)
            .limit(REPORTED_LINES)
        )
        with self._database.read() as connection:
            rows = connection.execute(statement).all()
        found = [(row.line, ItemProblem.from_json(row.problem)) for row in rows]
        return [
            ItemProblem(p.code, f"line {line}: {p.detail}", {**p.context, "line": line})
            for line, p in found
        ]


def _progress(connection: Connection, job_id: str) -> tuple[int, int, int]:
    """Last line, items and bad lines of a job: before its end only bad lines have failed."""
    last = (
        select(items.c.line, items.c.position)
        .where(items.c.job_id == job_id)
        .order_by(items.c.position.desc())
        .limit(1)
    )
    row = connection.execute(last).one_or_none()
    if row is None:
        return 0, 0, 0
    failed = select(func.count()).where(items.c.job_id == job_id, items.c.status == "failed")
    return row.line, row.position + 1, connection.execute(failed).scalar_one()
