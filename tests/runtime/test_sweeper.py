"""The sweeper's loop on real SQLite and the memory queue."""

from __future__ import annotations

import asyncio
import threading

import pytest
from prometheus_client import REGISTRY

from asap_runtime.database import Database, open_engine
from asap_runtime.migrate import upgrade
from asap_runtime.queue import BATCH, MemoryQueue
from asap_runtime.sweeper import ROWS, Sweeper
from asap_runtime.values import Outcome
from job_store import TENANT, Platform
from waiting import until

NEVER_S = 3600.0


@pytest.fixture
def platform(tmp_path):
    url = f"sqlite:///{tmp_path / 'asap.db'}"
    upgrade(url)
    database = Database(open_engine(url))
    yield Platform(database)
    database.close()


class Worker:
    """Claims what messages name and is done with it."""

    def __init__(self, platform, queue):
        self._store, self.done = platform.store, []
        queue.consume("one", self, concurrency=4)

    async def __call__(self, message):
        ids = [int(item_id) for item_id in message.item_ids]
        claims = await asyncio.to_thread(self._store.claim, ids, "one", "worker")
        await asyncio.to_thread(
            self._store.finish, [Outcome.done(claim, b"{}", None) for claim in claims]
        )
        self.done += [claim.id for claim in claims]


class Running:
    """A sweeper that looks by itself at the beginning only."""

    def __init__(self, platform, queue):
        self._sweep = platform.sweep
        self.sweeper = Sweeper(platform.sweep, queue, ["one"], period_s=NEVER_S)

    async def __aenter__(self):
        self._task = asyncio.create_task(self.sweeper.run())
        await until(lambda: self.sweeper._measure_at > 0)
        await until(self._is_at_rest)
        return self.sweeper

    def _is_at_rest(self):
        with self._sweep.active() as nobody_sweeps:
            return nobody_sweeps

    async def __aexit__(self, *_):
        self._task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await self._task
        assert "sweeper" not in {thread.name for thread in threading.enumerate()}


def metric(name, **labels):
    return REGISTRY.get_sample_value(name, labels)


async def test_a_woken_sweeper_brings_a_job_to_its_end(platform):
    queue = MemoryQueue()
    worker = Worker(platform, queue)
    async with Running(platform, queue) as sweeper:
        job_id = platform.job(3000)
        await asyncio.sleep(0.1)
        assert worker.done == []
        sweeper.wake()
        await until(lambda: platform.phase(job_id) == "done")
        await until(lambda: len(worker.done) >= 3000)  # the job may be seen to end before
    assert len(set(worker.done)) == len(worker.done) == 3000


async def test_what_was_sent_to_nobody_is_not_sent_again(platform):
    queue = MemoryQueue()
    async with Running(platform, queue) as sweeper:
        platform.job(100)
        sweeper.wake()
        await until(lambda: queue.pending("one") == 2)
        sweeper.wake()
        await asyncio.sleep(0.2)
    assert queue.pending("one") == 2


FIGURES = ("asap_queue_items", "asap_oldest_due_seconds")


def figures():
    return [metric(name, stage="one") for name in FIGURES]


async def test_who_does_not_lead_any_more_has_no_figures_instead_of_old_ones(platform):
    platform.job(3)
    async with Running(platform, MemoryQueue()) as sweeper:
        assert metric("asap_queue_items", stage="one") == 3
        with platform.sweep.active():
            sweeper.wake()
            await until(lambda: figures() == [None, None])
            assert metric("asap_items_open", stage="one", status="queued") is None
            platform.job(2)
        sweeper.wake()
        await until(lambda: metric("asap_queue_items", stage="one") == 5)


async def test_who_does_not_reach_the_database_has_no_figures(platform, monkeypatch):
    platform.job(3)
    async with Running(platform, MemoryQueue()) as sweeper:
        assert None not in figures()

        def broken(rows):
            raise OSError("the disk")

        monkeypatch.setattr(platform.sweep, "finish_jobs", broken)
        sweeper.wake()
        await until(lambda: figures() == [None, None])


async def test_trouble_with_the_database_does_not_end_it(platform, monkeypatch, capsys):
    queue = MemoryQueue()
    load = platform.sweep.load
    async with Running(platform, queue) as sweeper:
        failed = threading.Event()

        def broken(stage):
            failed.set()
            raise OSError("the disk")

        monkeypatch.setattr(platform.sweep, "load", broken)
        sweeper.wake()
        await until(failed.is_set)
        monkeypatch.setattr(platform.sweep, "load", load)
        platform.job(1)
        sweeper.wake()
        await until(lambda: queue.pending("one") == 1)


async def test_one_is_active_and_another_takes_over(platform):
    queue = MemoryQueue()
    async with Running(platform, queue) as sweeper:
        platform.job(1)
        with platform.sweep.active() as mine:
            assert mine
            sweeper.wake()
            await asyncio.sleep(0.2)
            assert queue.pending("one") == 0
        sweeper.wake()
        await until(lambda: queue.pending("one") == 1)


def test_passes_follow_each_other_while_there_is_something_to_do(platform):
    sweeper = Sweeper(platform.sweep, MemoryQueue(), ["one"], period_s=0.0)
    assert not sweeper.sweep()
    job_id = platform.job(2 * ROWS + 600)
    platform.ledger.cancel(TENANT, job_id)
    assert [sweeper.sweep() for _ in range(3)] == [True, True, False]
    assert set(platform.statuses(job_id)) == {"cancelled"}


def test_after_a_publication_it_stays_awake_for_the_end_of_the_job(platform):
    sweeper = Sweeper(platform.sweep, MemoryQueue(), ["one"], period_s=NEVER_S)
    platform.job(1)
    assert sweeper.sweep()
    assert sweeper.sweep()


def test_the_gauges_say_what_waits_and_what_was_lost(platform):
    queue = MemoryQueue()
    lost = metric("asap_leases_lost_total", stage="one") or 0.0
    republished = metric("asap_republished_total", stage="one") or 0.0
    platform.job(5, priority=BATCH)
    platform.claim(2)
    platform.claim(1, lease_s=-1)
    Sweeper(platform.sweep, queue, ["one"]).sweep()
    assert metric("asap_leases_lost_total", stage="one") == lost + 1
    assert metric("asap_republished_total", stage="one") == republished + 2
    assert metric("asap_queue_items", stage="one") == 5
    assert metric("asap_items_open", stage="one", status="queued") == 3
    assert metric("asap_items_open", stage="one", status="running") == 2
    assert metric("asap_oldest_due_seconds", stage="one") >= 0
