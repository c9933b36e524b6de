"""How a job comes in: its row, then its items in bounded batches, then the word that it is whole.

No item is claimed before that word: a job that turns out to be unreadable has cost nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from uuid import uuid4

from pydantic import JsonValue
from sqlalchemy import ColumnElement, Connection, and_, func, insert, null, select, update

from asap.errors import InvalidInput
from asap_runtime.database import Database, after, now
from asap_runtime.tables import idempotency, items, jobs
from asap_runtime.values import Due, ItemProblem, NewItem, pack

__all__ = [
    "LEASE_S",
    "REPORTED_LINES",
    "JobIntake",
    "Source",
    "StoredEvaluation",
    "StoredLines",
    "StoredRun",
    "StoredScores",
    "in_batches",
    "takes_items",
]

BATCH = 500
BATCH_BYTES = 8 * 2**20
"""Items and payload per transaction: no writer waits long, and memory does not grow with the
input."""
REPORTED_LINES = 100
"""Problems kept of a rejected job."""
LEASE_S = 60.0
"""How long a process that takes a stored file in may be silent before another one goes on."""


@dataclass(frozen=True, slots=True)
class StoredLines:
    """A stored file that holds a job's lines, and how to read it."""

    key: str
    ending: str
    schema: str
    owned: bool
    """An upload, deleted when its lines are in; a data set stays."""


@dataclass(frozen=True, slots=True)
class StoredScores:
    """An ended job of the same tenant, whose scores are used again."""

    scores_from: str


@dataclass(frozen=True, slots=True)
class StoredRun:
    """A training run on stored data, which becomes the job's only item."""

    base: str
    model: str
    sources: tuple[str, ...]
    """What is trained on, then what each id must survive in as well: an ended job of the same
    tenant by its id, or a stored file by its key, which has slashes.
    """


@dataclass(frozen=True, slots=True)
class StoredEvaluation:
    """A model to be asked the benchmarks of the job's configuration, one item for each question."""

    model: str
    model_prefix: str | None
    """With its manifest's hash: of a registered model; None for one that is served."""
    model_sha256: str | None


Source = StoredLines | StoredScores | StoredRun | StoredEvaluation
"""What a job is taken in from, after the request that made it was answered."""


def source_to_json(source: Source) -> str:
    """One JSON object."""
    return json.dumps(asdict(source))


def source_from_json(stored: str) -> Source:
    """The inverse of `source_to_json`."""
    fields = json.loads(stored)
    if "sources" in fields:
        return StoredRun(**{**fields, "sources": tuple(fields["sources"])})
    if "model_sha256" in fields:
        return StoredEvaluation(**fields)
    return StoredScores(**fields) if "scores_from" in fields else StoredLines(**fields)


class JobIntake:
    """Creates jobs and fills them. Blocking; safe to share between threads."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create_job(
        self,
        tenant: str,
        kind: str,
        config: Mapping[str, JsonValue],
        priority: int,
        *,
        expires_in_s: float | None = None,
        idempotency_key: str | None = None,
        trace: str | None = None,
        webhook: str | None = None,
        cost_cap: int | None = None,
        source: Source | None = None,
    ) -> str:
        """The id of a new job without items. One with a source waits to be taken in.

        With a key that `remember` called new, the job's id is tied to the key in the same
        transaction: a request that dies afterwards has left a trace that its repetition finds.
        The cap is in millionths of a US dollar.
        """
        row = _job_row(tenant, kind, config, priority, trace) | {
            "webhook": webhook,
            "cost_cap": cost_cap,
            "source": None if source is None else source_to_json(source),
            "expires_at": null() if expires_in_s is None else after(expires_in_s),
        }
        with self._database.write() as connection:
            return _insert_job(connection, row, idempotency_key)

    def create_single(
        self,
        tenant: str,
        kind: str,
        config: Mapping[str, JsonValue],
        priority: int,
        item: NewItem,
        *,
        idempotency_key: str | None = None,
        trace: str | None = None,
    ) -> tuple[str, Due]:
        """A whole job of one item, in one transaction: its id, and what a message names.

        The item is booked as published: the caller publishes it now, or withdraws it.
        """
        payload = None if item.payload is None else pack(item.payload)
        row = _job_row(tenant, kind, config, priority, trace) | {"ingested_at": now()}
        ended = item.stage is None or item.problem is not None
        with self._database.write() as connection:
            job_id = _insert_job(connection, row, idempotency_key)
            one = _row(0, item) | {
                "job_id": job_id,
                "tenant": tenant,
                "priority": priority,
                "payload": payload,
                "published_at": null() if ended else now(),
                "finished_at": now() if ended else null(),
            }
            item_id = connection.execute(insert(items).values(one)).inserted_primary_key
        assert item_id is not None
        return job_id, Due(item_id[0], priority, 0)

    def add_items(self, job_id: str, new: Iterable[NewItem]) -> int:
        """Append items in input order, in batches of their own transaction; how many.

        A `custom_id` that the job has already makes its line a failed item. Raises InvalidInput
        (`job-finished`) once the job is cancelled, rejected or complete; earlier batches stay.
        """
        added = 0
        for batch in in_batches(new):
            self.add_batch(job_id, batch)
            added += len(batch)
        return added

    def add_batch(
        self,
        job_id: str,
        batch: Sequence[NewItem],
        *,
        lease: int | None = None,
        lease_s: float = LEASE_S,
    ) -> int | None:
        """One transaction of `add_items`. With the lease of a taking: raises as well when it is no
        longer held, and extends it; the new lease.
        """
        payloads = [None if item.payload is None else pack(item.payload) for item in batch]
        with self._database.write() as connection:
            tenant, priority = _open_job(connection, job_id, lease)
            start = _next_position(connection, job_id)
            taken = _taken(connection, job_id, batch)
            rows: list[dict[str, object]] = []
            for position, item in enumerate(batch, start):
                kept = _checked(item, taken)
                row = {"job_id": job_id, "tenant": tenant, "priority": priority}
                rows.append({**row, **_row(position, kept), "payload": payloads[position - start]})
            connection.execute(insert(items), rows)
            connection.execute(
                update(items)
                .where(
                    items.c.job_id == job_id,
                    items.c.position >= start,
                    items.c.status.in_(("succeeded", "failed")),
                )
                .values(finished_at=now())
            )
            if lease is None:
                return None
            return _extend(connection, job_id, lease_s)

    def extend(self, job_id: str, lease: int, lease_s: float = LEASE_S) -> int:
        """The lease of a taking that adds nothing yet, longer. Raises InvalidInput
        (`job-finished`) when it is no longer held, or the job is stopped.
        """
        with self._database.write() as connection:
            _open_job(connection, job_id, lease)
            return _extend(connection, job_id, lease_s)

    def mark_ingested(self, job_id: str, *, lease: int | None = None) -> bool:
        """All items are in, work may begin. False when the job was stopped before or is whole, or
        the lease is no longer held.
        """
        return self._set_fact(job_id, lease, ingested_at=now())

    def reject(
        self, job_id: str, problems: Sequence[ItemProblem], *, lease: int | None = None
    ) -> bool:
        """The input cannot be used; the first 100 problems are kept. False when too late."""
        reported = ",".join(problem.to_json() for problem in problems[:REPORTED_LINES])
        return self._set_fact(job_id, lease, rejected_at=now(), problem=f"[{reported}]")

    def _set_fact(self, job_id: str, lease: int | None, **values: object) -> bool:
        statement = update(jobs).where(jobs.c.id == job_id, takes_items())
        if lease is not None:
            statement = statement.where(jobs.c.intake_until == lease)
        with self._database.write() as connection:
            return connection.execute(statement.values(values)).rowcount == 1


def in_batches(new: Iterable[NewItem]) -> Iterator[list[NewItem]]:
    """Items as they come, `BATCH` at a time or `BATCH_BYTES` of payload."""
    batch: list[NewItem] = []
    size = 0
    for item in new:
        batch.append(item)
        size += len(item.payload or b"")
        if len(batch) == BATCH or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def takes_items() -> ColumnElement[bool]:
    """The job is neither whole nor stopped."""
    return and_(
        jobs.c.ingested_at.is_(None), jobs.c.rejected_at.is_(None), jobs.c.cancelled_at.is_(None)
    )


def _job_row(
    tenant: str, kind: str, config: Mapping[str, JsonValue], priority: int, trace: str | None
) -> dict[str, object]:
    return {
        "id": uuid4().hex,
        "tenant": tenant,
        "kind": kind,
        "config": json.dumps(dict(config)),
        "priority": priority,
        "trace": trace,
        "created_at": now(),
    }


def _insert_job(connection: Connection, row: Mapping[str, object], key: str | None) -> str:
    connection.execute(insert(jobs).values(row))
    if key is not None:
        connection.execute(
            update(idempotency)
            .where(idempotency.c.tenant == row["tenant"], idempotency.c.key == key)
            .values(job_id=row["id"])
        )
    return str(row["id"])


def _open_job(connection: Connection, job_id: str, lease: int | None) -> tuple[str, int]:
    """Tenant and priority of a job that still takes items; it cannot be cancelled meanwhile, nor
    its lease be taken.
    """
    statement = select(jobs.c.tenant, jobs.c.priority).where(jobs.c.id == job_id, takes_items())
    if lease is not None:
        statement = statement.where(jobs.c.intake_until == lease)
    row = connection.execute(statement.with_for_update(read=lease is None)).one_or_none()
    if row is None:
        raise InvalidInput(
            f"job {job_id} takes no more items: it is complete, stopped, deleted or another's",
            code="job-finished",
        )
    return row.tenant, row.priority


def _extend(connection: Connection, job_id: str, lease_s: float) -> int:
    longer = (
        update(jobs)
        .where(jobs.c.id == job_id)
        .values(intake_until=after(lease_s))
        .returning(jobs.c.intake_until)
    )
    return int(connection.execute(longer).scalar_one())


def _next_position(connection: Connection, job_id: str) -> int:
    last = select(func.max(items.c.position)).where(items.c.job_id == job_id)
    position = connection.execute(last).scalar()
    return 0 if position is None else int(position) + 1


def _taken(connection: Connection, job_id: str, batch: Sequence[NewItem]) -> set[str]:
    named = [item.custom_id for item in batch if item.custom_id is not None]
    if not named:
        return set()
    statement = select(items.c.custom_id).where(
        items.c.job_id == job_id, items.c.custom_id.in_(named)
    )
    return set(connection.execute(statement).scalars())


def _checked(item: NewItem, taken: set[str]) -> NewItem:
    """The item, or a failed one in its place when its `custom_id` is taken; adds the id."""
    if item.custom_id is None:
        return item
    if item.custom_id not in taken:
        taken.add(item.custom_id)
        return item
    problem = ItemProblem(
        "invalid-input",
        f"line {item.line}: custom_id stands on an earlier line; expected a new one per line",
        {"line": item.line, "pointer": "/custom_id", "custom_id": item.custom_id},
    )
    return NewItem(item.line, item.stage, item.payload, problem=problem)


def _row(position: int, item: NewItem) -> dict[str, object]:
    status = "queued"
    if item.problem is not None:
        status = "failed"
    elif item.stage is None:
        status = "succeeded"
    return {
        "position": position,
        "stage": item.stage,
        "status": status,
        "attempt": 0,
        "fence": 0,
        "not_before": 0,
        "lease_losses": 0,
        "line": item.line,
        "custom_id": item.custom_id,
        "content_hash": item.content_hash,
        "problem_code": item.problem.code if item.problem else None,
        "problem": item.problem.to_json() if item.problem else None,
    }
