"""Deletes what has been kept long enough: finished jobs, with the files of training runs,
idempotency keys, the audit trail.

Bounded passes in small transactions; every replica may run one.
"""

from __future__ import annotations

import asyncio

from asap_runtime.audit import AuditTrail
from asap_runtime.blobs import BlobStore
from asap_runtime.database import Database
from asap_runtime.idempotency import IdempotencyKeys
from asap_runtime.ledger import JobLedger
from asap_runtime.logs import get_logger
from asap_runtime.run_removal import JobRemoval
from asap_runtime.sweep import Sweep

__all__ = ["Retention"]

PERIOD_S = 600.0
JOBS = 50
ROWS = 500
"""Per pass; a job may have a million items, deleted in transactions of 2,000."""
DAY_S = 24 * 3600.0


class Retention:
    """One pass every ten minutes, more while a pass is full.

    Args:
        database: where all of it is.
        blobs: where the files of training runs are; None: they stay.
        days: how long a finished job is kept.
    """

    def __init__(
        self,
        database: Database,
        blobs: BlobStore | None = None,
        *,
        days: float = 30.0,
        period_s: float = PERIOD_S,
    ) -> None:
        self._sweep, self._ledger = Sweep(database), JobLedger(database)
        self._removal = None if blobs is None else JobRemoval(database, blobs)
        self._keys, self._trail = IdempotencyKeys(database), AuditTrail(database)
        self._days, self._period_s = days, period_s
        self._log = get_logger()

    async def run(self) -> None:
        """Delete until cancelled; trouble with the database is logged and tried again."""
        while True:
            full = False
            try:
                full = await asyncio.to_thread(self.sweep)
            except Exception:
                self._log.exception("retention.failed")
            await asyncio.sleep(0 if full else self._period_s)

    def sweep(self) -> bool:
        """One pass; whether there may be more to delete. Blocking."""
        old = self._sweep.finished_before(self._days * DAY_S, JOBS)
        for tenant, job_id in old:
            self._delete(tenant, job_id)
        rows = (self._keys.forget_old(ROWS), self._trail.forget_old(ROWS))
        return len(old) == JOBS or ROWS in rows

    def _delete(self, tenant: str, job_id: str) -> None:
        if self._removal is None:
            self._ledger.delete(tenant, job_id)
        else:
            self._removal.delete(tenant, job_id)
