"""Idempotency keys: the first writer of (tenant, key) does the work, the others hear its answer."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, RowMapping, and_, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from asap_runtime.database import Database, after, now
from asap_runtime.tables import idempotency

__all__ = ["Answer", "First", "IdempotencyKeys", "InProgress", "Mismatch", "Replay"]

KEPT_S = 24 * 3600.0
ABANDONED_S = 120.0
"""An unanswered request that has created nothing by then is taken for dead; longer than any request
that creates its job row before it reads a long body."""


@dataclass(frozen=True, slots=True)
class First:
    """The caller is the first: do the work, then `store_response` or `forget`."""


@dataclass(frozen=True, slots=True)
class Replay:
    """The same request was answered like this."""

    status: int
    body: bytes


@dataclass(frozen=True, slots=True)
class InProgress:
    """The same request is being worked on; the job it has created, if it came that far."""

    job_id: str | None


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The key belongs to another request."""


Answer = First | Replay | InProgress | Mismatch


class IdempotencyKeys:
    """The keys of all tenants. Blocking; safe to share between threads."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def remember(self, tenant: str, key: str, request_hash: str) -> Answer:
        """Who the caller is for this key; the table's primary key decides between equals."""
        row = insert(idempotency).values(
            tenant=tenant, key=key, request_hash=request_hash, created_at=now()
        )
        while True:
            try:
                with self._database.write() as connection:
                    connection.execute(row)
                return First()
            except IntegrityError:
                answer = self._answer(tenant, key, request_hash)
            if answer is not None:  # None: the row was forgotten in between
                return answer

    def _answer(self, tenant: str, key: str, request_hash: str) -> Answer | None:
        is_key = and_(idempotency.c.tenant == tenant, idempotency.c.key == key)
        abandoned = and_(
            is_key,
            idempotency.c.request_hash == request_hash,
            idempotency.c.status.is_(None),
            idempotency.c.job_id.is_(None),
            idempotency.c.created_at < after(-ABANDONED_S),
        )
        outdated = and_(is_key, idempotency.c.created_at < after(-KEPT_S))
        with self._database.write() as connection:
            connection.execute(delete(idempotency).where(outdated))
            if connection.execute(
                update(idempotency).where(abandoned).values(created_at=now())
            ).rowcount:
                return First()
            row = _find(connection, tenant, key)
        if row is None:
            return None
        if row["request_hash"] != request_hash:
            return Mismatch()
        if row["status"] is None:
            return InProgress(row["job_id"])
        return Replay(row["status"], row["body"])

    def store_response(self, tenant: str, key: str, status: int, body: bytes) -> None:
        """What every repetition within 24 h will hear."""
        with self._database.write() as connection:
            connection.execute(
                update(idempotency)
                .where(idempotency.c.tenant == tenant, idempotency.c.key == key)
                .values(status=status, body=body)
            )

    def forget(self, tenant: str, key: str) -> None:
        """The request was refused (validation, 429, 503): its repetition is a new one."""
        with self._database.write() as connection:
            connection.execute(
                delete(idempotency).where(
                    idempotency.c.tenant == tenant,
                    idempotency.c.key == key,
                    idempotency.c.status.is_(None),
                )
            )

    def forget_old(self, limit: int) -> int:
        """Delete keys older than 24 h, oldest first; how many."""
        old = (
            select(idempotency.c.tenant, idempotency.c.key)
            .where(idempotency.c.created_at < after(-KEPT_S))
            .order_by(idempotency.c.created_at)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
        with self._database.write() as connection:
            rows = connection.execute(old).all()
            for tenant, key in rows:
                connection.execute(
                    delete(idempotency).where(
                        idempotency.c.tenant == tenant, idempotency.c.key == key
                    )
                )
        return len(rows)


def _find(connection: Connection, tenant: str, key: str) -> RowMapping | None:
    statement = select(
        idempotency.c.request_hash,
        idempotency.c.status,
        idempotency.c.body,
        idempotency.c.job_id,
    ).where(idempotency.c.tenant == tenant, idempotency.c.key == key)
    return connection.execute(statement).mappings().one_or_none()
