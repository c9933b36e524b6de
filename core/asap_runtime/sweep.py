"""The sweeper's side of the job store: publish what is due, and end what nobody else will end.

Every pass is idempotent, touches at most `limit` rows and finds them by an index; a caller repeats
a pass that was full. Whoever else sweeps at the same time costs work, never correctness.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from sqlalchemy import (
    ColumnElement,
    Connection,
    and_,
    bindparam,
    case,
    delete,
    exists,
    func,
    insert,
    literal,
    null,
    or_,
    select,
    update,
)

from asap_runtime.database import SECOND, Database, after, now
from asap_runtime.store import PAID_STAGES, has_status, in_turn, is_still
from asap_runtime.tables import OPEN, deliveries, items, jobs
from asap_runtime.values import Due, ItemProblem

__all__ = ["Backlog", "Expired", "Load", "Sweep"]

COUNTED = 10_000
"""A backlog beyond this is not counted further: it says "more workers" either way."""
REPUBLISH_S = 60.0
"""A message that has not led to a claim by then is taken for lost."""

_LOST = ItemProblem("lease-lost", "the worker disappeared each time this item was run")
_LATE = ItemProblem("deadline-exceeded", "the job's deadline passed before this item was done")
_SPENT = ItemProblem("cost-cap-reached", "the job's cost cap was reached before this item was done")
_CANCELLED = ItemProblem("cancelled", "the job was cancelled before this item was done")


@dataclass(frozen=True, slots=True)
class Expired:
    """What `expire_leases` did."""

    requeued: int
    failed: int
    stages: Mapping[str, int] = field(default_factory=dict, compare=False)
    """How many leases were lost at each stage."""


@dataclass(frozen=True, slots=True)
class Load:
    """Items of one stage that are under way: published but not claimed yet, and running."""

    published: int
    running: int


@dataclass(frozen=True, slots=True)
class Backlog:
    """Items of one stage: due (claimable now) and running; up to `COUNTED` of each are counted."""

    due: int
    running: int
    oldest_due_s: float
    """How long the oldest of the counted ones has been due."""


class Sweep:
    """The passes of the sweeper. Blocking; safe to share between threads."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def active(self) -> AbstractContextManager[bool]:
        """Enter before sweeping: True for one sweeper at a time, False for the others."""
        return self._database.sweeping()

    def due(self, stage: str, limit: int) -> list[Due]:
        """Items to publish, in claim order: due and unpublished, or published and forgotten."""
        forgotten = items.c.published_at < after(-REPUBLISH_S)
        query = select(items.c.id, items.c.priority, items.c.fence).where(
            or_(items.c.published_at.is_(None), forgotten)
        )
        with self._database.read() as connection:
            return [Due(**row._mapping) for row in in_turn(connection, query, stage, limit)]

    def mark_published(self, published: Sequence[Due]) -> None:
        """Remember that a message names them; items that moved on since are left alone."""
        if not published:
            return
        statement = (
            update(items)
            .where(
                items.c.id == bindparam("b_id"),
                items.c.fence == bindparam("b_fence"),
                is_still("queued"),
            )
            .values(published_at=now())
        )
        rows = [{"b_id": due.id, "b_fence": due.fence} for due in published]
        with self._database.write() as connection:
            connection.execute(statement, sorted(rows, key=lambda row: row["b_id"]))

    def withdraw(self, due: Due) -> None:
        """It was booked as published, but no message names it."""
        with self._database.write() as connection:
            connection.execute(
                update(items)
                .where(items.c.id == due.id, items.c.fence == due.fence, is_still("queued"))
                .values(published_at=null())
            )

    def expire_leases(self, limit: int, max_lease_losses: int = 3) -> Expired:
        """Queue items whose worker is silent; fail those that lost it `max_lease_losses` times."""
        silent = (
            select(items.c.id, items.c.stage, items.c.lease_losses)
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
        return Expired(len(others), len(poison), Counter(row.stage for row in rows))

    def end_items(self, limit: int, *, job_id: str | None = None) -> int:
        """End open items of jobs that are cancelled, rejected or past their deadline, and queued
        ones whose next stage costs money that the job's cap does not allow; how many.

        Running items first: from then on their late results fail the fence. A cap lets them end.
        """
        stopped = or_(jobs.c.cancelled_at.is_not(None), jobs.c.rejected_at.is_not(None))
        late = and_(~stopped, jobs.c.expires_at <= now())
        spent = and_(jobs.c.cost >= jobs.c.cost_cap, items.c.stage.in_(PAID_STAGES))
        ending = select(jobs.c.id).where(
            jobs.c.finished_at.is_(None), or_(stopped, late, jobs.c.cost >= jobs.c.cost_cap)
        )
        if job_id is not None:
            ending = ending.where(jobs.c.id == job_id)
        ended = 0
        with self._database.write() as connection:
            # Nearly always none, which the few unfinished jobs tell sooner than all their items.
            job_ids = connection.execute(ending.limit(limit)).scalars().all()
            if not job_ids:
                return 0
            for status, condition, values in (
                (has_status("running"), stopped, _ended("cancelled", _CANCELLED)),
                (has_status("running"), late, _ended("failed", _LATE)),
                (has_status("queued"), stopped, _ended("cancelled", _CANCELLED)),
                (has_status("queued"), late, _ended("failed", _LATE)),
                (has_status("queued"), spent, _ended("failed", _SPENT)),
            ):
                statement = (
                    select(items.c.id)
                    .join(jobs, jobs.c.id == items.c.job_id)
                    .where(jobs.c.id.in_(job_ids), condition, status)
                    .limit(limit - ended)
                    .with_for_update(of=items, skip_locked=True)
                )
                ids = connection.execute(statement).scalars().all()
                if ids:
                    connection.execute(update(items).where(items.c.id.in_(ids)).values(values))
                ended += len(ids)
        return ended

    def finish_jobs(self, limit: int) -> int:
        """Set `finished_at` of jobs whose items are all final, and queue their webhooks; how many.

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
                ~_has_item(items.c.status.in_(OPEN)),
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
                # A job that ends again, after a retry of its failed items, is reported again.
                connection.execute(delete(deliveries).where(deliveries.c.job_id.in_(ids)))
                reported = select(jobs.c.id, literal(0), now()).where(
                    jobs.c.id.in_(ids), jobs.c.webhook.is_not(None)
                )
                connection.execute(
                    insert(deliveries).from_select(["job_id", "attempt", "not_before"], reported)
                )
        return len(ids)

    def load(self, stage: str) -> Load:
        """What is under way. Cost: those items in their indexes, not the ones that wait."""
        with self._database.read() as connection:
            return Load(
                _count(connection, stage, items.c.published_at.is_not(None)),
                _count(connection, stage, *_RUNNING),
            )

    def backlog(self, stage: str) -> Backlog:
        """The scaling signal of one stage. Cost: up to `COUNTED` of its queued items."""
        due = (
            select(items.c.job_id, items.c.not_before)
            .where(items.c.stage == stage, has_status("queued"), items.c.not_before <= now())
            .limit(COUNTED)
            .subquery()
        )
        # New items are due since their job was taken in.
        since = case((due.c.not_before > 0, due.c.not_before), else_=jobs.c.ingested_at)
        waiting = select(func.count(), func.min(since), now()).select_from(
            due.join(jobs, jobs.c.id == due.c.job_id)
        )
        with self._database.read() as connection:
            count, oldest, time = connection.execute(waiting).one()
            running = _count(connection, stage, *_RUNNING)
        return Backlog(count, running, 0.0 if oldest is None else (time - oldest) / SECOND)

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


_RUNNING = (has_status("running"), items.c.lease_until > 0)  # as the index of leases has it


def _count(connection: Connection, stage: str, *conditions: ColumnElement[bool]) -> int:
    some = select(literal(1)).where(items.c.stage == stage, *conditions).limit(COUNTED).subquery()
    return connection.execute(select(func.count()).select_from(some)).scalar_one()


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
