"""The job store in the hands of a test: all its sides on one database, and a clock to turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.synchronize import Barrier
from pathlib import Path

from sqlalchemy import update

from asap_runtime import database as databases
from asap_runtime.blobs import BlobStore
from asap_runtime.database import SECOND, Database, open_engine
from asap_runtime.idempotency import IdempotencyKeys
from asap_runtime.ingest import Ingester, IntakeLimits
from asap_runtime.intake import JobIntake
from asap_runtime.ledger import JobLedger, Result
from asap_runtime.models import ModelRegistry, ModelVersion
from asap_runtime.store import JobStore
from asap_runtime.sweep import Sweep
from asap_runtime.tables import idempotency, items, jobs, removals
from asap_runtime.values import Claimed, ItemProblem, NewItem, Outcome
from waiting import PATIENCE_S

TENANT = "a"
PROBLEM = ItemProblem("upstream-timeout", "no answer in 5 s", {"status": 504})
PATIENT = dict.fromkeys(
    ("BUSY_TIMEOUT_S", "CONNECT_TIMEOUT_S", "STATEMENT_TIMEOUT_S"), int(PATIENCE_S)
)
"""Limits of a database under test: a machine that stands still for a while proves nothing."""


@dataclass(frozen=True)
class Platform:
    """Every side of the store, and the shortest way to a job."""

    database: Database

    @cached_property
    def intake(self) -> JobIntake:
        return JobIntake(self.database)

    @cached_property
    def store(self) -> JobStore:
        return JobStore(self.database)

    @cached_property
    def sweep(self) -> Sweep:
        return Sweep(self.database)

    @cached_property
    def ledger(self) -> JobLedger:
        return JobLedger(self.database)

    @cached_property
    def keys(self) -> IdempotencyKeys:
        return IdempotencyKeys(self.database)

    def job(
        self,
        size: int = 1,
        *,
        tenant: str = TENANT,
        priority: int = 5,
        stage: str | None = "one",
        ingested: bool = True,
        **options: object,
    ) -> str:
        job_id = self.intake.create_job(tenant, "prune", {"method": "asap"}, priority, **options)
        self.intake.add_items(
            job_id, (NewItem(line, stage, b'{"n":%d}' % line) for line in range(1, size + 1))
        )
        if ingested:
            self.intake.mark_ingested(job_id)
        return job_id

    def ids(self, stage: str = "one") -> list[int]:
        """Items that are due and unpublished, in claim order."""
        return [due.id for due in self.sweep.due(stage, 10_000)]

    def claim(self, limit: int = 64, stage: str = "one", **options: float) -> list[Claimed]:
        return self.store.claim_next(stage, "worker", limit, **options)

    def results(self, job_id: str, tenant: str = TENANT) -> list[Result]:
        return list(self.ledger.results(tenant, job_id))

    def statuses(self, job_id: str) -> list[str]:
        return [item.status for item in self.ledger.items(TENANT, job_id, limit=10_000)]

    def phase(self, job_id: str) -> str:
        view = self.ledger.job(TENANT, job_id)
        assert view is not None
        return view.phase

    def pass_time(self, seconds: float) -> None:
        """Move every stored moment back by so much: the database's clock cannot be turned."""
        with self.database.write() as connection:
            for table in (jobs, items, idempotency, removals):
                moments = {
                    column.name: column - round(seconds * SECOND)
                    for column in table.c
                    if column.name.endswith("_at")
                    or column.name in ("lease_until", "intake_until", "not_before")
                }
                connection.execute(update(table).values(moments))


_race: dict[str, Barrier] = {}


def enter_race(start: Barrier) -> None:
    """Initialiser of a racing process: it begins when all have come so far."""
    _race["start"] = start
    for name, limit_s in PATIENT.items():
        setattr(databases, name, limit_s)


def drain(url: str, owner: str) -> list[int]:
    """What a racing worker process does: claim and finish until nothing is left; its ids.

    All hold their first claims before one finishes any: an order in which a process is done
    before the others have woken is no race.
    """
    database = Database(open_engine(url))
    store, done = JobStore(database), []
    _race["start"].wait()
    claims = store.claim_next("one", owner, 16)
    _race["start"].wait()
    while claims:
        outcomes = [Outcome.done(claim, claim.payload, None) for claim in claims]
        assert store.finish(outcomes) == {claim.id for claim in claims}
        done += [claim.id for claim in claims]
        claims = store.claim_next("one", owner, 16)
    database.close()
    return done


def take_all_in(url: str, folder: str) -> list[str]:
    """What a racing ingester does: take files in until none waits; the jobs it has finished."""
    database = Database(open_engine(url))
    finished: list[str] = []
    blobs = BlobStore.in_folder(Path(folder))
    ingester = Ingester(database, blobs, IntakeLimits(), finished.append)
    _race["start"].wait()
    while ingester.take_in():
        pass
    database.close()
    return finished


def drain_messages(url: str, owner: str, messages: Sequence[Sequence[int]]) -> list[int]:
    """The same by the ids of messages, each of which every worker has received."""
    database = Database(open_engine(url))
    store, done = JobStore(database), []
    _race["start"].wait()
    for ids in messages:
        claims = store.claim(ids, "one", owner)
        store.finish([Outcome.done(claim, claim.payload, None) for claim in claims])
        done += [claim.id for claim in claims]
    database.close()
    return done


def remember(url: str, tenant: str, key: str, request_hash: str) -> str:
    """The answer of one process in a race for a key, by its name."""
    database = Database(open_engine(url))
    _race["start"].wait()
    answer = IdempotencyKeys(database).remember(tenant, key, request_hash)
    database.close()
    return type(answer).__name__


def register(url: str, name: str, job_ids: Sequence[str]) -> list[int]:
    """What one process of a race for versions of a name gets, by job."""
    database = Database(open_engine(url))
    registry = ModelRegistry(database)
    _race["start"].wait()
    versions = [a_model(registry, name, job_id).version for job_id in job_ids]
    database.close()
    return versions


def promote(url: str, name: str, versions: Sequence[int]) -> None:
    """One process of a race for the place in production."""
    database = Database(open_engine(url))
    registry = ModelRegistry(database)
    _race["start"].wait()
    for version in versions:
        registry.set_stage(TENANT, name, version, "production")
    database.close()


def annotate(url: str, name: str, keys: Sequence[str]) -> None:
    """One process of several that add figures to version 1."""
    database = Database(open_engine(url))
    registry = ModelRegistry(database)
    _race["start"].wait()
    for key in keys:
        registry.annotate(TENANT, name, 1, key, 1)
    database.close()


def a_model(registry: ModelRegistry, name: str, job_id: str, tenant: str = TENANT) -> ModelVersion:
    """A version as a training run registers it."""
    return registry.add(
        tenant,
        name,
        prefix=f"{tenant}/runs/{job_id}/model",
        manifest_sha256="0" * 64,
        base="demo",
        job_id=job_id,
        meta={"held_out_loss_after": 0.5},
    )
