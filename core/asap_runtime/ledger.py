"""The tenant's side of the job store: read jobs, items and results; cancel, retry, delete.

Every method takes the tenant, and another tenant's job does not exist. Lists go by cursor and never
touch a payload; results are read in input order, page by page, also while the job runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    RowMapping,
    Select,
    case,
    delete,
    exists,
    func,
    insert,
    null,
    select,
    tuple_,
    update,
)

from asap.errors import CostCapReached, InvalidInput
from asap_runtime.database import Database, now
from asap_runtime.phases import JobFacts, StageCount
from asap_runtime.store import affords, has_status
from asap_runtime.sweep import Sweep
from asap_runtime.tables import FINAL, OPEN, ItemStatus, items, jobs, problems
from asap_runtime.values import ItemProblem, unpack
from asap_runtime.views import ErrorSummary, ItemView, JobView, Result

__all__ = ["JobLedger", "JobView", "Result"]

PASS = 500
"""Items ended in the transaction of `cancel` itself; the sweeper ends the rest."""
DELETED_AT_ONCE = 2000
RESULT_PAGE = 64
"""Results in memory at a time; one may have several MiB."""
REPORTED_CODES = 5


class JobLedger:
    """Reads and decisions of a tenant. Blocking; safe to share between threads."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._sweep = Sweep(database)

    def job(self, tenant: str, job_id: str) -> JobView | None:
        """The job with its counts, from one snapshot; None when the tenant has no such job."""
        with self._database.read() as connection:
            views = _views(connection, _jobs_of(tenant).where(jobs.c.id == job_id))
        return views[0] if views else None

    def kind(self, tenant: str, job_id: str) -> str | None:
        """The kind of the tenant's job, None when there is no such job; counts nothing."""
        with self._database.read() as connection:
            return connection.execute(
                select(jobs.c.kind).where(_is_job(tenant, job_id))
            ).scalar_one_or_none()

    def first_payload(self, tenant: str, job_id: str) -> bytes | None:
        """What is stored of the job's first item now, ended or not; None before it is in."""
        statement = _items_of(tenant, job_id, items.c.payload).where(items.c.position == 0)
        with self._database.read() as connection:
            row = connection.execute(statement).one_or_none()
        return None if row is None or row.payload is None else unpack(row.payload)

    def jobs(self, tenant: str, cursor: str | None = None, limit: int = 20) -> list[JobView]:
        """Jobs after the cursor, newest first. Cost grows with the number of their items."""
        statement = _jobs_of(tenant).order_by(jobs.c.created_at.desc(), jobs.c.id.desc())
        if cursor is not None:
            place = tuple_(*_place(cursor))
            statement = statement.where(tuple_(jobs.c.created_at, jobs.c.id) < place)
        with self._database.read() as connection:
            return _views(connection, statement.limit(limit))

    def items(
        self,
        tenant: str,
        job_id: str,
        cursor: int | None = None,
        limit: int = 100,
        status: ItemStatus | None = None,
    ) -> list[ItemView]:
        """Items in input order whose position is above the cursor."""
        statement = _items_of(
            tenant,
            job_id,
            items.c.line,
            items.c.custom_id,
            items.c.stage,
            items.c.status,
            items.c.attempt,
            items.c.cost,
            items.c.problem,
        ).limit(limit)
        if cursor is not None:
            statement = statement.where(items.c.position > cursor)
        if status is not None:
            statement = statement.where(items.c.status == status)
        with self._database.read() as connection:
            rows = connection.execute(statement).mappings().all()
        return [ItemView(**{**row, "problem": _problem(row["problem"])}) for row in rows]

    def results(self, tenant: str, job_id: str, cursor: int | None = None) -> Iterator[Result]:
        """All final items in input order, from above the cursor; open ones are left out.

        Each page is a transaction of its own: no snapshot is held while a slow reader reads.
        """
        last = -1 if cursor is None else cursor
        page = (
            _final_results()
            .where(jobs.c.tenant == tenant, items.c.job_id == job_id)
            .order_by(items.c.position)
        )
        while True:
            with self._database.read() as connection:
                some = page.where(items.c.position > last).limit(RESULT_PAGE)
                rows = connection.execute(some).mappings().all()
            yield from map(_result, rows)
            if len(rows) < RESULT_PAGE:
                return
            last = rows[-1]["position"]

    def single_results(self, wanted: Mapping[str, str]) -> dict[str, Result]:
        """How the first item of each of these jobs ended, of those that have. `wanted` maps a
        job's id to its tenant. One statement, for the many requests that wait for a job of one.
        """
        first = _final_results().where(
            tuple_(jobs.c.id, jobs.c.tenant).in_(list(wanted.items())), items.c.position == 0
        )
        with self._database.read() as connection:
            rows = connection.execute(first.add_columns(items.c.job_id)).mappings().all()
        return {row["job_id"]: _result(row) for row in rows}

    def past_problems(self, tenant: str, job_id: str, position: int) -> list[ItemProblem]:
        """How earlier attempt series of an item ended, oldest first."""
        statement = (
            select(problems.c.problem)
            .join(items, items.c.id == problems.c.item_id)
            .join(jobs, jobs.c.id == items.c.job_id)
            .where(jobs.c.tenant == tenant, jobs.c.id == job_id, items.c.position == position)
            .order_by(problems.c.fence)
        )
        with self._database.read() as connection:
            return [ItemProblem.from_json(row) for row in connection.execute(statement).scalars()]

    def error_summary(self, tenant: str, job_id: str) -> list[ErrorSummary]:
        """The five most frequent problem codes of failed items. Cost grows with their number."""
        count = func.count()
        statement = (
            select(items.c.problem_code, count, func.min(items.c.position))
            .join(jobs, jobs.c.id == items.c.job_id)
            .where(jobs.c.tenant == tenant, items.c.job_id == job_id, has_status("failed"))
            .group_by(items.c.problem_code)
            .order_by(count.desc(), items.c.problem_code)
            .limit(REPORTED_CODES)
        )
        with self._database.read() as connection:
            found = connection.execute(statement).all()
            first = _items_of(tenant, job_id, items.c.line, items.c.problem).where(
                items.c.position.in_([position for _, _, position in found])
            )
            rows = {row.position: row for row in connection.execute(first)}
        return [
            ErrorSummary(
                code, number, rows[at].line, ItemProblem.from_json(rows[at].problem).detail
            )
            for code, number, at in found
            if at in rows
        ]

    def open_items(self, tenant: str | None = None) -> int:
        """Items that are not final, of one tenant or of all: what quotas are held against."""
        statement = (
            select(func.count())
            .select_from(jobs)
            .join(items, items.c.job_id == jobs.c.id)
            .where(jobs.c.finished_at.is_(None), items.c.status.in_(OPEN))
        )
        if tenant is not None:
            statement = statement.where(jobs.c.tenant == tenant)
        with self._database.read() as connection:
            return connection.execute(statement).scalar_one()

    def cancel(self, tenant: str, job_id: str) -> bool:
        """Stop the job: nothing of it is claimed from now on. False: no such job.

        Idempotent, and without effect on a job that has ended. Ends up to 500 items at once, those
        that run first; the sweeper ends the others.
        """
        statement = (
            update(jobs)
            .where(
                _is_job(tenant, job_id),
                jobs.c.cancelled_at.is_(None),
                jobs.c.rejected_at.is_(None),
                jobs.c.finished_at.is_(None),
            )
            .values(cancelled_at=now())
        )
        with self._database.write() as connection:
            known = _exists(connection, tenant, job_id)
            stopped = connection.execute(statement).rowcount
        if stopped:
            self._sweep.end_items(PASS, job_id=job_id)
        return known

    def retry_failed(self, tenant: str, job_id: str) -> int:
        """Give the failed items of a finished job a new attempt series; how many.

        Their problems go to the history, the fence grows on, and a deadline starts anew. Items that
        never had a stage or a payload (bad lines) stay failed. Nothing happens on other jobs.
        Raises CostCapReached when all that failed would cost money that the cap does not allow.
        """
        window = jobs.c.expires_at - jobs.c.created_at
        reopened = (
            update(jobs)
            .where(
                _is_job(tenant, job_id),
                jobs.c.finished_at.is_not(None),
                jobs.c.cancelled_at.is_(None),
                jobs.c.rejected_at.is_(None),
            )
            .values(finished_at=null(), expires_at=now() + window)
        )
        in_stage = (
            items.c.job_id == job_id,
            has_status("failed"),
            items.c.stage.is_not(None),
            items.c.payload.is_not(None),
            items.c.fence > 0,
        )
        again = (*in_stage, exists().where(jobs.c.id == items.c.job_id, affords()).correlate(items))
        history = select(items.c.id, items.c.fence, items.c.problem).where(*again)
        with self._database.write() as connection:
            if not _exists(connection, tenant, job_id):
                return 0
            if connection.execute(history.limit(1)).first() is None:
                if connection.execute(select(items.c.id).where(*in_stage).limit(1)).first():
                    raise CostCapReached(
                        "the job has reached its cost cap; submit what failed as a new job"
                    )
                return 0
            if not connection.execute(reopened).rowcount:
                return 0
            connection.execute(insert(problems).from_select(list(problems.c.keys()), history))
            return connection.execute(
                update(items)
                .where(*again)
                .values(
                    status="queued",
                    attempt=0,
                    lease_losses=0,
                    not_before=0,
                    published_at=null(),
                    finished_at=null(),
                )
            ).rowcount

    def delete(self, tenant: str, job_id: str) -> bool:
        """Stop the job and delete all its rows, in bounded transactions. False: no such job."""
        if not self.cancel(tenant, job_id):
            return False
        some = select(items.c.id).where(items.c.job_id == job_id).limit(DELETED_AT_ONCE)
        while True:
            with self._database.write() as connection:
                ids = connection.execute(some).scalars().all()
                if not ids:
                    return (
                        connection.execute(delete(jobs).where(_is_job(tenant, job_id))).rowcount
                        == 1
                    )
                connection.execute(delete(problems).where(problems.c.item_id.in_(ids)))
                connection.execute(delete(items).where(items.c.id.in_(ids)))


def _is_job(tenant: str, job_id: str) -> ColumnElement[bool]:
    return (jobs.c.tenant == tenant) & (jobs.c.id == job_id)


def _exists(connection: Connection, tenant: str, job_id: str) -> bool:
    found = connection.execute(select(jobs.c.id).where(_is_job(tenant, job_id)))
    return found.one_or_none() is not None


def _jobs_of(tenant: str) -> Select[Any]:
    return select(*jobs.c, now().label("now")).where(jobs.c.tenant == tenant)


def _items_of(tenant: str, job_id: str, *columns: ColumnElement[Any]) -> Select[Any]:
    return (
        select(items.c.position, *columns)
        .join(jobs, jobs.c.id == items.c.job_id)
        .where(jobs.c.tenant == tenant, items.c.job_id == job_id)
        .order_by(items.c.position)
    )


def _final_results() -> Select[Any]:
    return (
        select(
            items.c.position,
            items.c.line,
            items.c.custom_id,
            items.c.status,
            case((has_status("succeeded"), items.c.payload), else_=null()).label("payload"),
            items.c.problem,
        )
        .join(jobs, jobs.c.id == items.c.job_id)
        .where(items.c.status.in_(FINAL))
    )


def _views(connection: Connection, statement: Select[Any]) -> list[JobView]:
    rows = connection.execute(statement).mappings().all()
    counts: dict[str, list[StageCount]] = {row["id"]: [] for row in rows}
    grouped = (
        select(items.c.job_id, items.c.stage, items.c.status, func.count())
        .where(items.c.job_id.in_(counts))
        .group_by(items.c.job_id, items.c.status, items.c.stage)
        .order_by(items.c.stage, items.c.status)
    )
    for job_id, stage, status, count in connection.execute(grouped) if rows else ():
        counts[job_id].append(StageCount(stage, status, count))
    return [_view(row, counts[row["id"]]) for row in rows]


def _view(row: RowMapping, counts: Sequence[StageCount]) -> JobView:
    facts = JobFacts(
        created_at=row["created_at"],
        now=row["now"],
        ingested_at=row["ingested_at"],
        rejected_at=row["rejected_at"],
        cancelled_at=row["cancelled_at"],
        expires_at=row["expires_at"],
        finished_at=row["finished_at"],
    )
    return JobView(
        id=row["id"],
        kind=row["kind"],
        config=json.loads(row["config"]),
        priority=row["priority"],
        facts=facts,
        counts=tuple(counts),
        problems=tuple(ItemProblem(**problem) for problem in json.loads(row["problem"] or "[]")),
        cost=row["cost"],
        cost_cap=row["cost_cap"],
        webhook=row["webhook"],
        cursor="{created_at}.{id}".format_map(row),
    )


def _result(row: RowMapping) -> Result:
    payload = None if row["payload"] is None else unpack(row["payload"])
    problem = None if row["status"] == "succeeded" else _problem(row["problem"])
    names = ("position", "line", "custom_id", "status")
    return Result(**{name: row[name] for name in names}, payload=payload, problem=problem)


def _problem(stored: str | None) -> ItemProblem | None:
    return None if stored is None else ItemProblem.from_json(stored)


def _place(cursor: str) -> tuple[int, str]:
    created_at, _, job_id = cursor.partition(".")
    if not created_at.isdecimal():
        raise InvalidInput("the cursor is not one of ours; expected the one of an earlier page")
    return int(created_at), job_id
