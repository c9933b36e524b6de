"""The table of webhook deliveries: one row for each end of a job, written with that end.

At least once: a delivery is claimed under a lease, and whoever dies with it leaves it to the next.
A job that is worked on again (its failed items were retried) has nothing to report until it ends
again; then its row is a new one, and what an old claim writes touches nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import uniform

from sqlalchemy import select, update

from asap_runtime.database import Database, after, now
from asap_runtime.tables import deliveries, jobs

__all__ = ["DELAYS_S", "LEASE_S", "TRIES", "Deliveries", "Delivery"]

LEASE_S = 60.0
"""Far more than a call may take."""
DELAYS_S = (10.0, 60.0, 300.0, 1800.0)
"""After the first, second, … try that failed, more or less a quarter."""
TRIES = len(DELAYS_S) + 1
JITTER = 0.25


@dataclass(frozen=True, slots=True)
class Delivery:
    """A delivery held under a lease; `attempt` is 1 at the first try.

    `finished_at` names the end of the job that is to be reported; `lease_until` is the fence.
    """

    job_id: str
    tenant: str
    url: str
    finished_at: int
    attempt: int
    lease_until: int


class Deliveries:
    """Claims and outcomes of deliveries. Blocking; safe to share between threads."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def claim(self, limit: int) -> list[Delivery]:
        """Up to `limit` due deliveries of finished jobs, each given to one caller.

        The try counts from here, so that even one that kills its process has an end.
        """
        due = (
            select(
                deliveries.c.job_id,
                deliveries.c.attempt,
                jobs.c.tenant,
                jobs.c.webhook.label("url"),
                jobs.c.finished_at,
            )
            .join(jobs, jobs.c.id == deliveries.c.job_id)
            .where(
                deliveries.c.ended_at.is_(None),
                deliveries.c.not_before <= now(),
                jobs.c.finished_at.is_not(None),
            )
            .order_by(deliveries.c.not_before)
            .limit(limit)
            .with_for_update(of=deliveries, skip_locked=True)
        )
        with self._database.write() as connection:
            rows = connection.execute(due).mappings().all()
            spent = [row["job_id"] for row in rows if row["attempt"] >= TRIES]
            others = {row["job_id"]: row for row in rows if row["attempt"] < TRIES}
            if spent:
                connection.execute(
                    update(deliveries)
                    .where(deliveries.c.job_id.in_(spent))
                    .values(ended_at=now(), outcome="gave-up: interrupted")
                )
            if not others:
                return []
            claimed = connection.execute(
                update(deliveries)
                .where(deliveries.c.job_id.in_(others))
                .values(attempt=deliveries.c.attempt + 1, not_before=after(LEASE_S))
                .returning(
                    deliveries.c.job_id,
                    deliveries.c.attempt,
                    deliveries.c.not_before.label("lease_until"),
                )
            )
            return [Delivery(**{**others[row["job_id"]], **row}) for row in claimed.mappings()]

    def end(self, delivery: Delivery, outcome: str) -> bool:
        """No further try. False when the claim no longer held and nothing was changed."""
        return self._write(delivery, ended_at=now(), outcome=outcome)

    def fail(self, delivery: Delivery, reason: str) -> bool:
        """The try failed: due again later, or given up after the last one. False as in `end`."""
        if delivery.attempt >= TRIES:
            return self.end(delivery, f"gave-up: {reason}")
        delay_s = DELAYS_S[delivery.attempt - 1] * uniform(1 - JITTER, 1 + JITTER)
        return self._write(delivery, not_before=after(delay_s), outcome=f"retry: {reason}")

    def _write(self, delivery: Delivery, **values: object) -> bool:
        statement = (
            update(deliveries)
            .where(
                deliveries.c.job_id == delivery.job_id,
                deliveries.c.attempt == delivery.attempt,
                deliveries.c.not_before == delivery.lease_until,
                deliveries.c.ended_at.is_(None),
            )
            .values(values)
        )
        with self._database.write() as connection:
            return connection.execute(statement).rowcount == 1
