"""The data of a training run: the records of ended jobs, written to the run's folder as JSONL.

A run has the id of its job. Whoever goes on where another process stopped writes the same keys
again, and a blob appears whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from asap.errors import Conflict, InvalidInput
from asap.payloads import route_of
from asap.runs import TrainRun
from asap.train_config import TrainConfig
from asap_runtime.blobs import BlobStore
from asap_runtime.intake import StoredRun
from asap_runtime.ledger import JobLedger
from asap_runtime.rebudgeting import TARGETS, ended_job
from asap_runtime.values import NewItem
from asap_runtime.views import JobView

__all__ = ["check_data", "is_job", "records_in", "run_item"]

BEAT = 100
"""Records between two words that the work goes on; one may have several MiB."""


def is_job(source: str) -> bool:
    """Whether a source of a `StoredRun` is a job's id; else it is a blob's key."""
    return "/" not in source


def records_in(view: JobView) -> int:
    """How many records an ended job has. Raises InvalidInput when there is none."""
    count = sum(count.items for count in view.counts if count.status == "succeeded")
    if not count:
        raise _nothing(f"job {view.id} has no records")
    return count


def check_data(blobs: BlobStore, key: str) -> None:
    """Raise InvalidInput for a data set without a byte, NotFound for one that is gone."""
    if not blobs.size(key):
        raise _nothing("the data set is empty")


def run_item(
    ledger: JobLedger,
    blobs: BlobStore,
    tenant: str,
    job_id: str,
    config: Mapping[str, Any],
    source: StoredRun,
    keep: Callable[[], None],
) -> NewItem:
    """The one item of a training job, when its data are in the blob store.

    `keep` is called every hundred records: it may extend a lease, or end the work by an exception.
    Raises InvalidInput where there is nothing to train on, NotFound for a source that vanished,
    Conflict when a job's items changed while they were read.
    """
    run = TrainRun(
        id=job_id,
        tenant=tenant,
        config=TrainConfig.model_validate(config),
        base=source.base,
        model=source.model,
        data="",
    )
    keys, first = [], source.sources[0]
    for number, origin in enumerate(source.sources):
        if is_job(origin):
            name = f"common-{number}.jsonl" if number else "data.jsonl"
            _export(ledger, blobs, tenant, origin, f"{run.prefix}/{name}", keep)
            keys.append(f"{run.prefix}/{name}")
        else:
            check_data(blobs, origin)
            keys.append(origin)
    meta = _origin(ended_job(ledger, tenant, first)) if is_job(first) else {"dataset": first}
    run = run.grown(data=keys[0], common_with=keys[1:], meta=meta)
    return NewItem(1, route_of(run)[0], run.model_dump_json().encode())


def _export(
    ledger: JobLedger,
    blobs: BlobStore,
    tenant: str,
    job_id: str,
    key: str,
    keep: Callable[[], None],
) -> None:
    view = ended_job(ledger, tenant, job_id, pointer="/job")
    records_in(view)
    left = sum(count.items for count in view.counts)
    with blobs.create(key) as writer:
        for number, result in enumerate(ledger.results(tenant, job_id)):
            if result.payload is not None:
                writer.write(result.payload + b"\n")
            if number % BEAT == 0:
                keep()
            left -= 1
        if left:
            raise Conflict(f"job {job_id} changed while it was read", code="results-not-ready")


def _origin(view: JobView) -> dict[str, Any]:
    """What a reader of the run wants to know of the job behind its data."""
    names = ("method", *TARGETS)
    known = {name: view.config[name] for name in names if view.config.get(name) is not None}
    return {"job": view.id, **known}


def _nothing(what: str) -> InvalidInput:
    return InvalidInput(f"{what}: there is nothing to train on")
