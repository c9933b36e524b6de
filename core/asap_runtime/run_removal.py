"""Deletes a job with what it has in the blob store: the folder of a training run.

`model/` in that folder belongs to the registry once the model has a version there, and goes with
that version.
"""

from __future__ import annotations

from asap_runtime.blobs import BlobStore
from asap_runtime.ledger import JobLedger
from asap_runtime.models import ModelRegistry

__all__ = ["delete_job"]


def delete_job(
    ledger: JobLedger, blobs: BlobStore, registry: ModelRegistry, tenant: str, job_id: str
) -> bool:
    """Stop and delete a job of any kind, with its files. False: no such job."""
    if ledger.kind(tenant, job_id) == "train":
        # Files before rows: of a job without a row nobody would know that it had some.
        ledger.cancel(tenant, job_id)
        _delete_run(blobs, registry, tenant, job_id)
    return ledger.delete(tenant, job_id)


def _delete_run(blobs: BlobStore, registry: ModelRegistry, tenant: str, job_id: str) -> None:
    folder = f"{tenant}/runs/{job_id}"
    model = registry.of_job(tenant, job_id)
    if model is None:
        blobs.delete_below(folder)
        return
    for key in blobs.keys_below(folder):
        if not key.startswith(f"{model.prefix}/"):
            blobs.delete(key)
