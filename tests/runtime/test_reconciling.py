"""Launched work hears of the end of its job, on real SQLite and the memory queue."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import update

from asap.errors import CapacityError
from asap.runs import TrainRun
from asap.train_config import TrainConfig
from asap_runtime.database import Database, open_engine
from asap_runtime.host import StageHost
from asap_runtime.migrate import upgrade
from asap_runtime.queue import MemoryQueue
from asap_runtime.reconciling import jobs_at_work
from asap_runtime.stage import Done, RunnerLimits, Wait
from asap_runtime.tables import jobs
from asap_runtime.values import NewItem
from job_store import PROBLEM, TENANT, Platform
from waiting import until

LIMITS = RunnerLimits(lease_s=60, heartbeat_s=0.1, timeout_s=60, max_attempts=2)


@pytest.fixture
def platform(tmp_path):
    url = f"sqlite:///{tmp_path}/asap.db"
    upgrade(url)
    database = Database(open_engine(url))
    yield Platform(database)
    database.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("asap_runtime.reconciling.PERIOD_S", 0.05)


class Launcher:
    """What outlives a worker: work by job id, and the times that it was started."""

    def __init__(self):
        self.at_work, self.starts, self.done = {}, {}, set()


class Trainer:
    """Launches once, then waits for the launcher's word."""

    name, concurrency = "trainer", 4

    def __init__(self, launcher, wait_s=0.02):
        self.launcher, self.wait_s, self.asked, self.broken = launcher, wait_s, 0, 0

    async def start(self):
        """Nothing to load."""

    async def process(self, run):
        if run.id in self.launcher.done:
            self.launcher.at_work.pop(run.id, None)
            return Done(run)
        if run.id not in self.launcher.at_work:
            self.launcher.at_work[run.id] = run
            self.launcher.starts[run.id] = self.launcher.starts.get(run.id, 0) + 1
        return Wait(run, self.wait_s)

    async def launched(self):
        self.asked += 1
        if self.broken:
            self.broken -= 1
            raise CapacityError("the cluster is away")
        return list(self.launcher.at_work)

    async def cancel(self, job_id):
        self.launcher.at_work.pop(job_id, None)

    async def stop(self):
        """Nothing to let go."""


def training(platform, **options):
    job_id = platform.intake.create_job(TENANT, "train", {}, 5, **options)
    run = TrainRun(id=job_id, tenant=TENANT, config=TrainConfig(), base="b", model="m", data="k")
    platform.intake.add_items(job_id, [NewItem(1, "trainer", run.model_dump_json().encode())])
    platform.intake.mark_ingested(job_id)
    return job_id


def host_of(platform, trainer):
    return StageHost(
        platform.database, MemoryQueue(), [trainer], limits=LIMITS, sweep_period_s=0.05
    )


async def test_a_run_waits_hundreds_of_times_without_an_attempt_and_then_succeeds(platform):
    launcher = Launcher()
    trainer = Trainer(launcher, wait_s=0.0)
    calls = 0
    process = trainer.process

    async def counted(run):
        nonlocal calls
        calls += 1
        if calls == 100:
            launcher.done.add(run.id)
        return await process(run)

    trainer.process = counted
    async with host_of(platform, trainer):
        job_id = training(platform)
        await until(lambda: platform.phase(job_id) == "done")
    assert calls >= 100 > LIMITS.max_attempts
    assert launcher.starts == {job_id: 1}
    [item] = platform.ledger.items(TENANT, job_id)
    assert (item.status, item.attempt) == ("succeeded", 0)


@pytest.mark.parametrize("end", ["cancel", "delete"])
async def test_a_stop_reaches_the_work_while_its_item_waits(platform, end):
    launcher = Launcher()
    async with host_of(platform, Trainer(launcher, wait_s=600)):
        stopped, other = training(platform), training(platform)
        await until(lambda: set(launcher.at_work) == {stopped, other})
        for job_id in (stopped, other):
            await until(lambda id=job_id: platform.statuses(id) == ["queued"])
        getattr(platform.ledger, end)(TENANT, stopped)
        await until(lambda: set(launcher.at_work) == {other})
        assert platform.statuses(other) == ["queued"]
        if end == "cancel":
            await until(lambda: platform.phase(stopped) == "cancelled")
    assert launcher.starts == {stopped: 1, other: 1}


async def test_a_deadline_reaches_it_too(platform):
    launcher = Launcher()
    async with host_of(platform, Trainer(launcher, wait_s=600)):
        job_id = training(platform, expires_in_s=3600)
        await until(lambda: job_id in launcher.at_work)
        with platform.database.write() as connection:
            connection.execute(update(jobs).values(expires_at=1))
        await until(lambda: not launcher.at_work)
        await until(lambda: platform.phase(job_id) == "expired")


async def test_a_worker_that_was_away_stops_what_is_left_over(platform):
    launcher = Launcher()
    async with host_of(platform, Trainer(launcher, wait_s=600)):
        job_id, other = training(platform), training(platform)
        await until(lambda: len(launcher.at_work) == 2)
    platform.ledger.cancel(TENANT, job_id)
    async with host_of(platform, Trainer(launcher)):
        await until(lambda: set(launcher.at_work) == {other})


async def test_trouble_of_the_launcher_is_asked_again(platform):
    launcher = Launcher()
    trainer = Trainer(launcher, wait_s=600)
    async with host_of(platform, trainer):
        job_id = training(platform)
        await until(lambda: launcher.at_work)
        trainer.broken = 3
        platform.ledger.cancel(TENANT, job_id)
        await until(lambda: not launcher.at_work)
    assert trainer.broken == 0


async def test_work_that_may_run_is_never_stopped(platform):
    """Not while it waits, not while it is run, and not when it comes between list and look."""
    launcher = Launcher()
    cancelled = []

    class Watched(Trainer):
        async def launched(self):
            listed = await super().launched()
            await asyncio.sleep(0.02)  # others are launched meanwhile
            return listed

        async def cancel(self, job_id):
            cancelled.append(job_id)

    trainer = Watched(launcher, wait_s=0.01)
    async with host_of(platform, trainer):
        for _ in range(10):
            training(platform)
            await asyncio.sleep(0.03)
        await until(lambda: trainer.asked > 10 and len(launcher.at_work) == 10)
        assert cancelled == []


def test_at_work_is_who_has_an_open_item_at_the_stage_and_a_live_job(platform):
    waiting, cancelled, failed = (training(platform) for _ in range(3))
    elsewhere = platform.job(1, stage="anchor")
    platform.ledger.cancel(TENANT, cancelled)
    claims = {claim.job_id: claim for claim in platform.claim(stage="trainer")}
    assert set(claims) == {waiting, failed}
    platform.store.fail(claims[failed], PROBLEM)
    asked = [waiting, cancelled, failed, elsewhere, "0" * 32]
    assert jobs_at_work(platform.database, asked, "trainer") == {waiting}
    assert jobs_at_work(platform.database, [], "trainer") == set()
