"""The worker's side of the job store: claim, keep, and write back under a fence. No tenant here.

Each claim raises the item's fence, which nothing ever resets; each write names the fence and the
owner it was claimed with, the item must still be running and its job live. A write that touches no
row changes nothing, whatever the writer believes. All statements lock rows in id order, so that
two of them never wait for each other.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import (
    ColumnElement,
    Connection,
    RowMapping,
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
from asap_runtime.values import Claimed, ItemProblem, Outcome, pack, unpack

__all__ = ["MAX_BATCH", "JobStore", "has_status", "is_live"]

MAX_BATCH = 64
"""Most items one message names, one claim takes and one `finish` writes."""


def has_status(status: ItemStatus) -> ColumnElement[bool]:
    """Spelled into the statement: a bound parameter would hide the partial indexes."""
    return items.c.status == literal_column(f"'{status}'")


def is_live() -> ColumnElement[bool]:
    """The job row allows work: taken in, not rejected, cancelled or past its deadline."""
    return and_(
        jobs.c.ingested_at.is_not(None),
        jobs.c.rejected_at.is_(None),
        jobs.c.cancelled_at.is_(None),
        or_(jobs.c.expires_at.is_(None), jobs.c.expires_at > now()),
    )


def _job_is_live() -> ColumnElement[bool]:
    return exists().where(jobs.c.id == items.c.job_id, is_live()).correlate(items)


_CLAIMABLE = and_(has_status("queued"), items.c.not_before <= now(), _job_is_live())
_TRACE = select(jobs.c.trace).where(jobs.c.id == items.c.job_id).correlate(items).scalar_subquery()


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
        """Up to `limit` due items by (priority, position), which takes turns between jobs.

        The way without a broker. Cost grows with the items that stand before them and are not due.
        """
        ready = (
            select(items.c.id)
            .where(items.c.stage == stage, _CLAIMABLE)
            .order_by(items.c.priority, items.c.position)
            .limit(min(limit, MAX_BATCH))
            .with_for_update(skip_locked=True)
        )
        with self._database.write() as connection:
            ids = connection.execute(ready).scalars().all()
            return _claim(connection, ids, stage, owner, lease_s) if ids else []

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

        An id that is missing belonged to a stale claim: its outcome is dropped.
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
        .where(items.c.id.in_(ids), items.c.stage == stage, _CLAIMABLE)
        .order_by(items.c.id)
        .with_for_update()
        .cte("free")
    )
    statement = (
        update(items)
        .where(items.c.id == free.c.id, has_status("queued"))
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
        )
    )
    claims = [
        Claimed(**{**row, "payload": unpack(row["payload"])})
        for row in connection.execute(statement).mappings()
    ]
    return sorted(claims, key=lambda claim: (claim.priority, claim.position, claim.id))


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
        .where(items.c.id.in_(ids), has_status("running"), _job_is_live())
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
    "finished_at": case((bindparam("b_final") == 1, now()), else_=null()),
}
_FENCED = and_(
    items.c.id == bindparam("b_id"), items.c.fence == bindparam("b_fence"), has_status("running")
)
_WRITE_STATE = update(items).where(_FENCED).values(**_STATE)
_WRITE_ALL = update(items).where(_FENCED).values(payload=bindparam("b_payload"), **_STATE)


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
    }
    if outcome.payload is not None:
        row["b_payload"] = pack(outcome.payload)
    return row
