"""The sweeper's side of the job store: publish what is due, and end what nobody else will end.

Every pass is idempotent, touches at most `limit` rows and finds them by an index; a caller repeats
a pass that was full. Whoever else sweeps at the same time costs work, never correctness.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from sqlalchemy import (
    ColumnElement,
    and_,
    bindparam,
    case,
    exists,
    func,
    literal,
    null,
    or_,
    select,
    update,
)

from asap_runtime.database import Database, after, now
from asap_runtime.store import has_status, is_live
from asap_runtime.tables import items, jobs
from asap_runtime.values import Due, ItemProblem

__all__ = ["Backlog", "Expired", "Sweep"]

REPUBLISH_S = 60.0
"""A message that has not led to a claim by then is taken for lost."""

_LOST = ItemProblem("lease-lost", "the worker disappeared each time this item was run")
_LATE = ItemProblem("deadline-exceeded", "the job's deadline passed before this item was done")
_CANCELLED = ItemProblem("cancelled", "the job was cancelled before this item was done")


@dataclass(frozen=True, slots=True)
class Expired:
    """What `expire_leases` did."""

    requeued: int
    failed: int


@dataclass(frozen=True, slots=True)
class Backlog:
    """Items of one stage: due (claimable now), running, and published but not yet claimed."""

    due: int
    running: int
    published: int


class Sweep:
    """The passes of the sweeper. Blocking; safe to share between threads."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def active(self) -> AbstractContextManager[bool]:
        """Enter before sweeping: True for one sweeper at a time, False for the others."""
        return self._database.sweeping()

    def due(self, stage: str, limit: int, *, job_id: str | None = None) -> list[Due]:
        """Items to publish, in claim order: due and unpublished, or published and forgotten.

        With `job_id` those of one job only, for a request that must not wait for the next sweep.
        """
        forgotten = items.c.published_at < after(-REPUBLISH_S)
        statement = (
            select(items.c.id, items.c.priority, items.c.fence)
            .join(jobs, jobs.c.id == items.c.job_id)
            .where(
                items.c.stage == stage,
                has_status("queued"),
                items.c.not_before <= now(),
                or_(items.c.published_at.is_(None), forgotten),
                is_live(),
            )
            .order_by(items.c.priority, items.c.position)
            .limit(limit)
        )
        if job_id is not None:
            statement = statement.where(items.c.job_id == job_id)
        with self._database.read() as connection:
            return [Due(*row) for row in connection.execute(statement)]

    def mark_published(self, published: Sequence[Due]) -> None:
        """Remember that a message names them; items that moved on since are left alone."""
        if not published:
            return
        statement = (
            update(items)
            .where(
                items.c.id == bindparam("b_id"),
                items.c.fence == bindparam("b_fence"),
                has_status("queued"),
            )
            .values(published_at=now())
        )
        rows = [{"b_id": due.id, "b_fence": due.fence} for due in published]
        with self._database.write() as connection:
            connection.execute(statement, sorted(rows, key=lambda row: row["b_id"]))

    def expire_leases(self, limit: int, max_lease_losses: int = 3) -> Expired:
        """Queue items whose worker is silent; fail those that lost it `max_lease_losses` times."""
        silent = (
            select(items.c.id, items.c.lease_losses)
            .where(has_status("running"), items.c.lease_until < now())
            .order_by(items.c.lease_until)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
        with self._database.write() as connection:
            rows = connection.execute(silent).all()
            poison = [row.id for row in rows if row.lease_losses + 1 >= max_lease_losses]
            others = [row.id for row in rows if row.lease_losses + 1 < max_lease_losses]
            if poison:
                connection.execute(
                    update(items)
                    .where(items.c.id.in_(poison))
                    .values(lease_losses=items.c.lease_losses + 1, **_ended("failed", _LOST))
                )
            if others:
                connection.execute(
                    update(items)
                    .where(items.c.id.in_(others))
                    .values(
                        status="queued",
                        lease_losses=items.c.lease_losses + 1,
                        lease_owner=null(),
                        lease_until=null(),
                        published_at=null(),
                    )
                )
        return Expired(requeued=len(others), failed=len(poison))

    def end_items(self, limit: int, *, job_id: str | None = None) -> int:
        """End open items of jobs that are cancelled, rejected or past their deadline; how many.

        Running items first: from then on their late results fail the fence.
        """
        stopped = or_(jobs.c.cancelled_at.is_not(None), jobs.c.rejected_at.is_not(None))
        late = jobs.c.expires_at <= now()
        ended = 0
        with self._database.write() as connection:
            for status in (has_status("running"), has_status("queued")):
                statement = (
                    select(items.c.id, stopped.label("stopped"))
                    .join(jobs, jobs.c.id == items.c.job_id)
                    .where(jobs.c.finished_at.is_(None), or_(stopped, late), status)
                    .limit(limit - ended)
                    .with_for_update(of=items, skip_locked=True)
                )
                if job_id is not None:
                    statement = statement.where(jobs.c.id == job_id)
                rows = connection.execute(statement).all()
                cancelled = [row.id for row in rows if row.stopped]
                expired = [row.id for row in rows if not row.stopped]
                for ids, values in (
                    (cancelled, _ended("cancelled", _CANCELLED)),
                    (expired, _ended("failed", _LATE)),
                ):
                    if ids:
                        connection.execute(update(items).where(items.c.id.in_(ids)).values(values))
                ended += len(rows)
        return ended

    def finish_jobs(self, limit: int) -> int:
        """Set `finished_at` of jobs whose items are all final; how many.

        A job that was done before its deadline is finished at its last item's end, not at the
        sweep, which may come after the deadline.
        """
        last_end = (
            select(func.coalesce(func.max(items.c.finished_at), now()))
            .where(items.c.job_id == jobs.c.id)
            .correlate(jobs)
            .scalar_subquery()
        )
        ready = (
            select(jobs.c.id)
            .where(
                jobs.c.finished_at.is_(None),
                or_(
                    jobs.c.ingested_at.is_not(None),
                    jobs.c.rejected_at.is_not(None),
                    jobs.c.cancelled_at.is_not(None),
                ),
                ~_has_item(has_status("queued")),
                ~_has_item(has_status("running")),
            )
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
        with self._database.write() as connection:
            ids = connection.execute(ready).scalars().all()
            if ids:
                connection.execute(
                    update(jobs)
                    .where(jobs.c.id.in_(ids))
                    .values(finished_at=case((jobs.c.expires_at <= now(), last_end), else_=now()))
                )
        return len(ids)

    def backlog(self, stage: str) -> Backlog:
        """The scaling signal of one stage. Cost: one pass over its queued items in the index."""
        at_stage = items.c.stage == stage
        counts = {
            "due": and_(has_status("queued"), items.c.not_before <= now()),
            "running": has_status("running"),
            "published": and_(has_status("queued"), items.c.published_at.is_not(None)),
        }
        with self._database.read() as connection:
            return Backlog(
                **{
                    name: connection.execute(
                        select(func.count()).select_from(items).where(at_stage, condition)
                    ).scalar_one()
                    for name, condition in counts.items()
                }
            )

    def finished_before(self, age_s: float, limit: int) -> list[tuple[str, str]]:
        """(tenant, job id) of jobs that finished longer ago than `age_s`: past their retention."""
        statement = (
            select(jobs.c.tenant, jobs.c.id)
            .where(jobs.c.finished_at < after(-age_s))
            .order_by(jobs.c.finished_at)
            .limit(limit)
        )
        with self._database.read() as connection:
            return [(row.tenant, row.id) for row in connection.execute(statement)]


def _has_item(condition: ColumnElement[bool]) -> ColumnElement[bool]:
    return exists().where(items.c.job_id == jobs.c.id, condition).correlate(jobs)


def _ended(status: str, problem: ItemProblem) -> dict[str, object]:
    """Column values of an item that ends without a worker."""
    return {
        "status": status,
        "lease_owner": null(),
        "lease_until": null(),
        "published_at": null(),
        "finished_at": now(),
        "problem_code": literal(problem.code),
        "problem": literal(problem.to_json()),
    }
