"""What is deleted after its time, on every database."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import update

from asap_runtime import retention
from asap_runtime.audit import AuditTrail
from asap_runtime.database import SECOND
from asap_runtime.idempotency import First, Replay
from asap_runtime.retention import Retention
from asap_runtime.tables import audit
from job_store import TENANT

DAY = 24 * 3600


def finished(platform, count=1, **options):
    job_ids = [platform.job(0, **options) for _ in range(count)]
    assert platform.sweep.finish_jobs(100) == count
    return job_ids


def test_jobs_are_deleted_when_they_have_been_finished_long_enough(platform):
    [mine], [theirs] = finished(platform), finished(platform, tenant="b")
    unfinished = platform.job(1)
    keep = Retention(platform.database, days=30)
    platform.pass_time(30 * DAY - 60)
    assert not keep.sweep()
    assert platform.ledger.job(TENANT, mine) is not None
    platform.pass_time(120)
    [young] = finished(platform)
    assert not keep.sweep()
    assert platform.ledger.job(TENANT, mine) is None
    assert platform.ledger.job("b", theirs) is None
    left = {view.id for view in platform.ledger.jobs(TENANT)}
    assert left == {unfinished, young}
    assert len(platform.ids()) == 1


def test_items_go_with_their_job(platform):
    job_id = platform.job(3)
    for claim in platform.claim():
        platform.store.advance(claim, b"{}", None)
    platform.sweep.finish_jobs(10)
    platform.pass_time(31 * DAY)
    Retention(platform.database).sweep()
    assert platform.results(job_id) == []
    assert platform.ledger.open_items() == 0


def test_old_idempotency_keys_are_deleted(platform):
    platform.keys.remember(TENANT, "old", "h")
    platform.keys.store_response(TENANT, "old", 200, b"")
    platform.pass_time(25 * 3600)
    platform.keys.remember(TENANT, "new", "h")
    platform.keys.store_response(TENANT, "new", 200, b"")
    Retention(platform.database).sweep()
    assert platform.keys.forget_old(10) == 0
    assert platform.keys.remember(TENANT, "new", "h") == Replay(200, b"")
    assert platform.keys.remember(TENANT, "old", "h") == First()


def test_a_pass_over_jobs_is_bounded_and_says_that_there_is_more(platform, monkeypatch):
    monkeypatch.setattr(retention, "JOBS", 2)
    finished(platform, 3)
    platform.pass_time(31 * DAY)
    keep = Retention(platform.database)
    assert keep.sweep()
    assert len(platform.ledger.jobs(TENANT)) == 1
    assert not keep.sweep()
    assert platform.ledger.jobs(TENANT) == []


def test_a_pass_over_keys_is_bounded_and_says_that_there_is_more(platform, monkeypatch):
    monkeypatch.setattr(retention, "ROWS", 3)
    for number in range(4):
        platform.keys.remember(TENANT, f"k{number}", "h")
    platform.pass_time(25 * 3600)
    keep = Retention(platform.database)
    assert keep.sweep()
    assert not keep.sweep()
    assert platform.keys.forget_old(10) == 0


def test_old_acts_are_deleted(platform):
    trail = AuditTrail(platform.database)
    act = {"tenant": TENANT, "actor": "k", "action": "x", "object": "-", "result": "200"}
    trail.record(**act)
    with platform.database.write() as connection:
        connection.execute(update(audit).values(at=audit.c.at - 401 * DAY * SECOND))
    trail.record(**act)
    Retention(platform.database).sweep()
    assert len(trail.entries(TENANT)) == 1


def test_four_may_delete_at_once(platform):
    finished(platform, 12)
    platform.pass_time(31 * DAY)
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(Retention(platform.database).sweep) for _ in range(4)]
        for run in runs:
            run.result()
    assert platform.ledger.jobs(TENANT) == []


async def test_the_loop_survives_trouble(platform, monkeypatch):
    finished(platform)
    platform.pass_time(31 * DAY)
    calls, done, loop = [], asyncio.Event(), asyncio.get_running_loop()
    keep = Retention(platform.database, period_s=0.01)
    sweep = keep.sweep

    def troubled():
        calls.append(1)
        if len(calls) == 1:
            raise OSError("the database is away")
        full = sweep()
        loop.call_soon_threadsafe(done.set)
        return full

    monkeypatch.setattr(keep, "sweep", troubled)
    task = asyncio.create_task(keep.run())
    await done.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert platform.ledger.jobs(TENANT) == []
