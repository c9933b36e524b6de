"""Deletes a job with what it has in the blob store: the folder of a training run.

`model/` in that folder belongs to the registry once the model has a version there, and goes with
that version. Whatever still trains hears of the end of its job a moment later, and may write a last
checkpoint: the folder of a deleted job is deleted once more after an hour.
"""

from __future__ import annotations

from contextlib import suppress

from sqlalchemy import delete, insert, select
from sqlalchemy.exc import IntegrityError

from asap_runtime.blobs import BlobStore
from asap_runtime.database import Database, after, now
from asap_runtime.ledger import JobLedger
from asap_runtime.models import ModelRegistry
from asap_runtime.tables import removals

__all__ = ["JobRemoval"]

AGAIN_S = 3600.0
"""By then a training process has been stopped, if by force."""
ROWS = 100


class JobRemoval:
    """Deletes jobs and their files. Blocking; safe to share between threads."""

    def __init__(self, database: Database, blobs: BlobStore) -> None:
        self._database, self._blobs = database, blobs
        self._ledger, self._registry = JobLedger(database), ModelRegistry(database)

    def delete(self, tenant: str, job_id: str) -> bool:
        """Stop and delete a job of any kind, with its files. False: no such job."""
        if self._ledger.kind(tenant, job_id) != "train":
            return self._ledger.delete(tenant, job_id)
        self._ledger.cancel(tenant, job_id)
        row = {"job_id": job_id, "tenant": tenant, "removed_at": now()}
        with suppress(IntegrityError), self._database.write() as connection:  # it is known
            connection.execute(insert(removals).values(row))
        # Files before rows: a store that is away leaves a job that can be deleted again.
        self._delete_files(tenant, job_id)
        return self._ledger.delete(tenant, job_id)

    def repeat(self) -> int:
        """Delete the files of jobs that were deleted an hour ago once more; of how many."""
        old = (
            select(removals.c.tenant, removals.c.job_id)
            .where(removals.c.removed_at < after(-AGAIN_S))
            .order_by(removals.c.removed_at)
            .limit(ROWS)
        )
        with self._database.read() as connection:
            rows = connection.execute(old).all()
        for tenant, job_id in rows:
            self._delete_files(tenant, job_id)
            with self._database.write() as connection:
                connection.execute(delete(removals).where(removals.c.job_id == job_id))
        return len(rows)

    def _delete_files(self, tenant: str, job_id: str) -> None:
        folder = f"{tenant}/runs/{job_id}"
        model = self._registry.of_job(tenant, job_id)
        if model is None:
            self._blobs.delete_below(folder)
            return
        for key in self._blobs.keys_below(folder):
            if not key.startswith(f"{model.prefix}/"):
                self._blobs.delete(key)
