"""The audit trail: who did what to which object, and how it ended. Rows are added and, after their
time, removed; nothing changes one.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import delete, insert, select

from asap_runtime.database import Database, after, now
from asap_runtime.tables import audit

__all__ = ["AuditEntry", "AuditTrail"]

KEPT_S = 400 * 24 * 3600.0


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One act. `id` is its cursor in `entries()`, `at` is in microseconds since the epoch."""

    id: int
    at: int
    tenant: str
    actor: str
    action: str
    object: str
    result: str
    request_id: str | None


class AuditTrail:
    """The acts of all tenants. Blocking; safe to share between threads."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def record(
        self,
        *,
        tenant: str,
        actor: str,
        action: str,
        object: str,
        result: str,
        request_id: str | None = None,
    ) -> None:
        """Add one act, at the database's time.

        Values may come from a request: what is no printable character becomes "?", and what is too
        long for its column is cut, so that an act cannot hide behind a refused row.
        """
        given = {
            "tenant": tenant,
            "actor": actor,
            "action": action,
            "object": object,
            "result": result,
            "request_id": request_id,
        }
        row = {name: value if value is None else _fit(name, value) for name, value in given.items()}
        with self._database.write() as connection:
            connection.execute(insert(audit).values(at=now(), **row))

    def entries(self, tenant: str, cursor: int | None = None, limit: int = 100) -> list[AuditEntry]:
        """Acts within a tenant, newest first, from below the cursor."""
        statement = select(audit).where(audit.c.tenant == tenant).order_by(audit.c.id.desc())
        if cursor is not None:
            statement = statement.where(audit.c.id < cursor)
        with self._database.read() as connection:
            rows = connection.execute(statement.limit(limit)).mappings().all()
        return [AuditEntry(**row) for row in rows]

    def forget_old(self, limit: int, *, age_s: float = KEPT_S) -> int:
        """Delete acts older than 400 days, oldest first; how many."""
        old = select(audit.c.id).where(audit.c.at < after(-age_s)).order_by(audit.c.at)
        with self._database.write() as connection:
            statement = delete(audit).where(audit.c.id.in_(old.limit(limit)))
            return connection.execute(statement).rowcount


def _fit(column: str, value: str) -> str:
    length: int = audit.c[column].type.length  # type: ignore[attr-defined]
    return "".join(c if c.isprintable() else "?" for c in value[:length])
