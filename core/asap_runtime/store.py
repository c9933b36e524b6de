"""The worker's side of the job store: claim, keep, and write back under a fence. No tenant here.

Each claim raises the item's fence, which nothing ever resets; each write names the fence and the
owner it was claimed with, the item must still be running and its job live. A write that touches no
row changes nothing, whatever the writer believes. All statements lock rows in id order, items
before jobs, so that two of them never wait for each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    RowMapping,
    Select,
    and_,
    bindparam,
    case,
    exists,
    literal_column,
    null,
    or_,
    select,
    update,
)

from asap_runtime.database import SECOND, Database, after, now
from asap_runtime.tables import ItemStatus, items, jobs
from asap_runtime.turns import take_turns
from asap_runtime.values import Claimed, ItemProblem, Outcome, pack, unpack

__all__ = [
    "CLAIMABLE",
    "MAX_BATCH",
    "PAID_STAGES",
    "JobStore",
    "affords",
    "has_status",
    "in_turn",
    "is_live",
    "is_still",
]

MAX_BATCH = 64
"""Most items one message names, one claim takes and one `finish` writes."""
PAID_STAGES = ("anchor",)
"""Stages whose work costs money; the others go on when the money of a job is spent."""


def has_status(status: ItemStatus) -> ColumnElement[bool]:
    """Spelled into the statement: a bound parameter would hide the partial indexes."""
    return items.c.status == literal_column(f"'{status}'")


def is_still(status: ItemStatus) -> ColumnElement[bool]:
    """For items that are named by id: an expression that no partial index answers.

    After a quiet hour PostgreSQL takes such an index for empty and walks the whole of it, however
    full it is by now, rather than to look 64 ids up.
    """
    return items.c.status.concat("") == literal_column(f"'{status}'")


def is_live() -> ColumnElement[bool]:
    """The job row allows work: taken in, not rejected, cancelled or past its deadline."""
    return and_(
        jobs.c.ingested_at.is_not(None),
        jobs.c.rejected_at.is_(None),
        jobs.c.cancelled_at.is_(None),
        or_(jobs.c.expires_at.is_(None), jobs.c.expires_at > now()),
    )


def affords() -> ColumnElement[bool]:
    """The item's stage costs nothing, or its job has not reached its cost cap."""
    return or_(
        items.c.stage.not_in(PAID_STAGES), jobs.c.cost_cap.is_(None), jobs.c.cost < jobs.c.cost_cap
    )


def _job_is_live() -> ColumnElement[bool]:
    return exists().where(jobs.c.id == items.c.job_id, is_live()).correlate(items)


def in_turn(connection: Connection, query: Select[Any], stage: str, limit: int) -> list[Row[Any]]:
    """The first `limit` rows of a query over items that may be claimed now, in claim order.

    Live items before batch before background; at the same priority tenants take turns, and within
    a tenant its jobs, by position. Cost: two index look-ups per tenant that has unfinished jobs,
    the rows, and the items that stand before them and are not due.
    """
    at = query.where(
        items.c.stage == stage,
        items.c.priority == bindparam("b_priority"),
        items.c.tenant == bindparam("b_tenant"),
        has_status("queued"),
        CLAIMABLE,
    ).order_by(items.c.position)
    queueing = (
        select(jobs.c.priority, jobs.c.tenant)
        .where(jobs.c.finished_at.is_(None), is_live())
        .distinct()
        .order_by(jobs.c.priority, jobs.c.tenant)
    )
    rows: list[Row[Any]] = []
    for priority, pairs in groupby(
        connection.execute(queueing).all(), key=lambda row: row.priority
    ):

        def ask(tenant: str, count: int, priority: int = priority) -> list[Row[Any]]:
            of_tenant = {"b_priority": priority, "b_tenant": tenant}
            return list(connection.execute(at.limit(count), of_tenant))

        rows += take_turns([row.tenant for row in pairs], limit - len(rows), ask)
    return rows


# A value and not EXISTS, which PostgreSQL may turn into a join that sorts a whole backlog.
_MAY_START = (
    select(and_(is_live(), affords()))
    .where(jobs.c.id == items.c.job_id)
    .correlate(items)
    .scalar_subquery()
)
_AFFORDED = exists().where(jobs.c.id == items.c.job_id, affords()).correlate(items)
CLAIMABLE = and_(items.c.not_before <= now(), _MAY_START)
"""Due, and the job allows it. The status is for each query to name, by index or by id."""
_TRACE = select(jobs.c.trace).where(jobs.c.id == items.c.job_id).correlate(items).scalar_subquery()
_COST_CAP = (
    select(jobs.c.cost_cap).where(jobs.c.id == items.c.job_id).correlate(items).scalar_subquery()
)
_TAKEN_IN = (
    select(jobs.c.ingested_at).where(jobs.c.id == items.c.job_id).correlate(items).scalar_subquery()
)


class JobStore:
    """Claims and their outcomes. Blocking; safe to share between threads."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def claim(
        self, ids: Sequence[int], stage: str, owner: str, lease_s: float = 60.0
    ) -> list[Claimed]:
        """Of these items (up to 64) those that are free now, in claim order.

        One conditional UPDATE: of any number of concurrent callers one gets an item. Unknown,
        doubled and already taken ids are left out silently. `owner` names one run of one process.
        """
        if len(ids) > MAX_BATCH:
            raise ValueError(f"a claim takes up to {MAX_BATCH} ids, got {len(ids)}")
        if not ids:
            return []
        with self._database.write() as connection:
            return _claim(connection, ids, stage, owner, lease_s)

    def claim_next(
        self, stage: str, owner: str, limit: int = MAX_BATCH, lease_s: float = 60.0
    ) -> list[Claimed]:
        """Up to `limit` due items in the order of `in_turn`: the way without a broker."""
        free = select(items.c.id).with_for_update(skip_locked=True)
        with self._database.write() as connection:
            ids = [row.id for row in in_turn(connection, free, stage, min(limit, MAX_BATCH))]
            return _claim(connection, ids, stage, owner, lease_s) if ids else []

    def affords(self, claim: Claimed) -> bool:
        """Whether the cost cap of the claim's job still allows its stage to begin."""
        statement = select(items.c.id).where(items.c.id == claim.id, _AFFORDED)
        with self._database.read() as connection:
            return connection.execute(statement).first() is not None

    def heartbeat(self, claims: Sequence[Claimed], lease_s: float = 60.0) -> set[int]:
        """Extend the leases; the ids that are still held. Stop all work on the others."""
        if not claims:
            return set()
        with self._database.write() as connection:
            held = {id for id, _ in _held(connection, claims)}
            if held:
                connection.execute(
                    update(items).where(items.c.id.in_(held)).values(lease_until=after(lease_s))
                )
        return held

    def finish(self, outcomes: Sequence[Outcome]) -> set[int]:
        """Write up to 64 outcomes in one transaction; the ids whose row was touched.

        An id that is missing belonged to a stale claim: its outcome is dropped, but what it cost is
        booked on the job, for the money is spent.
        """
        if not outcomes:
            return set()
        with self._database.write() as connection:
            held = _held(connection, [outcome.claim for outcome in outcomes])
            rows = [
                _row(outcome, held[key])
                for outcome in outcomes
                if (key := (outcome.claim.id, outcome.claim.fence)) in held
            ]
            for statement, part in (
                (_WRITE_ALL, [row for row in rows if "b_payload" in row]),
                (_WRITE_STATE, [row for row in rows if "b_payload" not in row]),
            ):
                if part:
                    connection.execute(statement, part)
            _book(connection, outcomes)
        return {id for id, _ in held}

    def advance(self, claim: Claimed, payload: bytes, next_stage: str | None) -> bool:
        """Done: the payload has grown; next stage, or succeeded when there is none."""
        return claim.id in self.finish([Outcome.done(claim, payload, next_stage)])

    def wait(self, claim: Claimed, payload: bytes, seconds: float) -> bool:
        """Not finished: due again in `seconds`; counts as no attempt."""
        return claim.id in self.finish([Outcome.wait(claim, payload, seconds)])

    def retry(self, claim: Claimed, problem: ItemProblem, delay_s: float) -> bool:
        """An attempt failed: due again in `delay_s`, the problem kept for the reader."""
        return claim.id in self.finish([Outcome.retry(claim, problem, delay_s)])

    def fail(self, claim: Claimed, problem: ItemProblem) -> bool:
        """Failed for good."""
        return claim.id in self.finish([Outcome.fail(claim, problem)])

    def release(self, claims: Sequence[Claimed]) -> set[int]:
        """Give claims back untouched, due at once; the ids that were still held."""
        return self.finish([Outcome.release(claim) for claim in claims])


def _claim(
    connection: Connection, ids: Sequence[int], stage: str, owner: str, lease_s: float
) -> list[Claimed]:
    free = (
        select(items.c.id)
        .where(items.c.id.in_(ids), items.c.stage == stage, is_still("queued"), CLAIMABLE)
        .order_by(items.c.id)
        .with_for_update()
        .cte("free")
    )
    statement = (
        update(items)
        .where(items.c.id == free.c.id, is_still("queued"))
        .values(
            status="running",
            fence=items.c.fence + 1,
            lease_owner=owner,
            lease_until=after(lease_s),
            published_at=null(),
        )
        .returning(
            items.c.id,
            items.c.job_id,
            items.c.position,
            items.c.stage,
            items.c.attempt,
            items.c.fence,
            items.c.lease_owner.label("owner"),
            items.c.priority,
            items.c.payload,
            _TRACE.label("trace"),
            _COST_CAP.label("cost_cap"),
            items.c.not_before,
            _TAKEN_IN.label("taken_in"),
            now().label("claimed_at"),
        )
    )
    claims = [_claimed(dict(row)) for row in connection.execute(statement).mappings()]
    return sorted(claims, key=lambda claim: (claim.priority, claim.position, claim.id))


def _claimed(row: dict[str, Any]) -> Claimed:
    due_at = max(row.pop("not_before"), row.pop("taken_in"))
    waited_s = (row.pop("claimed_at") - due_at) / SECOND
    return Claimed(**{**row, "payload": unpack(row["payload"])}, waited_s=waited_s)


def _held(connection: Connection, claims: Sequence[Claimed]) -> dict[tuple[int, int], RowMapping]:
    """The rows that their claims still hold, by id and fence; locked until the transaction ends."""
    wanted = {(claim.id, claim.fence, claim.owner) for claim in claims}
    ids = {claim.id for claim in claims}
    statement = (
        select(
            items.c.id,
            items.c.fence,
            items.c.lease_owner,
            items.c.stage,
            items.c.attempt,
            items.c.lease_losses,
            items.c.problem_code,
            items.c.problem,
        )
        .where(items.c.id.in_(ids), is_still("running"), _job_is_live())
        .order_by(items.c.id)
        .with_for_update()
    )
    return {
        (row["id"], row["fence"]): row
        for row in connection.execute(statement).mappings()
        if (row["id"], row["fence"], row["lease_owner"]) in wanted
    }


_STATE = {
    "status": bindparam("b_status"),
    "stage": bindparam("b_stage"),
    "attempt": bindparam("b_attempt"),
    "lease_losses": bindparam("b_lease_losses"),
    "not_before": now() + bindparam("b_delay", type_=items.c.not_before.type),
    "problem_code": bindparam("b_problem_code"),
    "problem": bindparam("b_problem"),
    "lease_owner": null(),
    "lease_until": null(),
    "published_at": null(),
    "cost": items.c.cost + bindparam("b_cost"),
    "finished_at": case((bindparam("b_final") == 1, now()), else_=null()),
}
_FENCED = and_(
    items.c.id == bindparam("b_id"), items.c.fence == bindparam("b_fence"), is_still("running")
)
_WRITE_STATE = update(items).where(_FENCED).values(**_STATE)
_WRITE_ALL = update(items).where(_FENCED).values(payload=bindparam("b_payload"), **_STATE)
_COST = jobs.c.cost + bindparam("b_cost")
_ADD_COST = update(jobs).where(jobs.c.id == bindparam("b_id")).values(cost=_COST)


def _book(connection: Connection, outcomes: Sequence[Outcome]) -> None:
    """Add to each job what its claims cost. After the items and in id order, as everywhere."""
    costs: Counter[str] = Counter()
    for outcome in outcomes:
        costs[outcome.claim.job_id] += outcome.cost
    rows = [{"b_id": job_id, "b_cost": cost} for job_id, cost in sorted(costs.items()) if cost]
    if rows:
        connection.execute(_ADD_COST, rows)


def _row(outcome: Outcome, held: RowMapping) -> dict[str, object]:
    """The parameters of the write: the new state of the item after this outcome."""
    ends = outcome.kind == "fail" or (outcome.kind == "done" and outcome.next_stage is None)
    moves = outcome.kind == "done" and not ends
    code, problem = held["problem_code"], held["problem"]
    if outcome.problem is not None:
        code, problem = outcome.problem.code, outcome.problem.to_json()
    elif outcome.kind == "done":
        code, problem = None, None
    row: dict[str, object] = {
        "b_id": outcome.claim.id,
        "b_fence": outcome.claim.fence,
        "b_status": ("failed" if outcome.kind == "fail" else "succeeded") if ends else "queued",
        "b_stage": outcome.next_stage if moves else held["stage"],
        "b_attempt": 0 if moves else held["attempt"] + (outcome.kind == "retry"),
        "b_lease_losses": 0 if moves else held["lease_losses"],
        "b_delay": round(outcome.delay_s * SECOND),
        "b_problem_code": code,
        "b_problem": problem,
        "b_final": int(ends),
        "b_cost": outcome.cost,
    }
    if outcome.payload is not None:
        row["b_payload"] = pack(outcome.payload)
    return row
