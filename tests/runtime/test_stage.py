"""The runner and the sweeper on real SQLite and the memory queue, with stages that do as told."""

from __future__ import annotations

import asyncio
import json
import re
import threading

import pytest
from sqlalchemy import select, update

from asap.config import PruneConfig
from asap.errors import CapacityError, InvalidInput, UpstreamUnavailable
from asap.types import Record, Triple
from asap_runtime.database import Database, open_engine
from asap_runtime.host import StageHost
from asap_runtime.intake import JobIntake
from asap_runtime.ledger import JobLedger
from asap_runtime.logs import configure_logs
from asap_runtime.migrate import upgrade
from asap_runtime.queue import BATCH, LIVE, MemoryQueue, Message
from asap_runtime.settings import TelemetrySettings
from asap_runtime.spending import spend
from asap_runtime.stage import Done, RunnerLimits, Wait, next_stage
from asap_runtime.store import JobStore
from asap_runtime.tables import items, jobs
from asap_runtime.values import NewItem, pack, unpack
from job_store import Platform
from waiting import PATIENCE_S, until

FAST = RunnerLimits(
    lease_s=60,
    heartbeat_s=0.1,
    timeout_s=60,
    max_attempts=3,
    backoff_base_s=0.01,
    backoff_cap_s=0.05,
)


class Scripted:
    """A stage that asks a function what to do with each record."""

    def __init__(self, name, act=None, concurrency=8):
        self.name, self.concurrency = name, concurrency
        self._act = act
        self.seen = []
        self.running = self.most = 0

    async def start(self):
        """Nothing to load."""

    async def process(self, record):
        self.seen.append(record.id)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if self._act is not None:
                result = await self._act(record, self.seen.count(record.id))
                if result is not None:
                    return result
            return Done(record)
        finally:
            self.running -= 1

    async def stop(self):
        """Nothing to let go."""


@pytest.fixture
def database(tmp_path):
    configure_logs(TelemetrySettings())
    url = f"sqlite:///{tmp_path}/asap.db"
    upgrade(url)
    opened = Database(open_engine(url))
    yield opened
    opened.close()


def job_of(database, count, priority=BATCH, method="asap", ingested=True):
    intake = JobIntake(database)
    job = intake.create_job("t", "prune", {}, priority)
    config = PruneConfig(method=method)
    records = [
        Record(
            triple=Triple(id=f"{job[:4]}-{i}", question="q", cot="a\n\nb", answer="x"),
            config=config,
        )
        for i in range(count)
    ]
    payloads = [record.model_dump_json().encode() for record in records]
    intake.add_items(job, (NewItem(i, "anchor", p) for i, p in enumerate(payloads, 1)))
    if ingested:
        intake.mark_ingested(job)
    return job


async def ended(database, job):
    ledger = JobLedger(database)
    await until(lambda: ledger.job("t", job).phase in ("done", "cancelled"))
    return list(ledger.results("t", job))


def host_of(database, *stages, queue=None):
    return StageHost(database, queue or MemoryQueue(), stages, limits=FAST, sweep_period_s=0.05)


async def test_items_visit_the_stages_of_their_route_once_each(database):
    anchor, surprisal = Scripted("anchor"), Scripted("surprisal")
    async with host_of(database, anchor, surprisal):
        results = await ended(database, job_of(database, 200))
    assert [r.status for r in results] == ["succeeded"] * 200
    assert len(anchor.seen) == len(surprisal.seen) == 200
    assert len(set(anchor.seen)) == 200


def test_the_route_is_that_of_the_method():
    triple = Triple(question="q", cot="c", answer="a")
    routes = {"asap": "surprisal", "asap_stage1": None}
    for method, following in routes.items():
        record = Record(triple=triple, config=PruneConfig(method=method))
        assert next_stage(record, "anchor") == following
    assert next_stage(record, "surprisal") is None


async def test_a_retryable_error_is_tried_again_and_bounded(database):
    async def act(record, times):
        if record.id.endswith("-0") and times < 3:
            raise UpstreamUnavailable("busy")
        if record.id.endswith("-1"):
            raise UpstreamUnavailable("gone")
        if record.id.endswith("-2"):
            raise InvalidInput("wrong", code="no-code")

    anchor = Scripted("anchor", act)
    async with host_of(database, anchor, Scripted("surprisal")):
        results = await ended(database, job_of(database, 4))
    assert [r.status for r in results] == ["succeeded", "failed", "failed", "succeeded"]
    assert [r.problem.code for r in results[1:3]] == ["upstream-unavailable", "no-code"]
    attempts = [sum(seen.endswith(f"-{i}") for seen in anchor.seen) for i in range(4)]
    assert attempts == [3, 3, 1, 1]


async def test_an_item_outlives_any_number_of_lacks_of_capacity(database):
    refusals, seen = 4 * FAST.max_attempts, []

    async def act(record, times):
        with database.engine.connect() as connection:
            seen.append(connection.execute(select(items.c.attempt, items.c.problem_code)).one())
        if times <= refusals:
            raise CapacityError("no memory")
        if times == refusals + 1:
            raise UpstreamUnavailable("busy")  # the first attempt that counts

    async with host_of(database, Scripted("anchor", act), Scripted("surprisal")):
        [result] = await ended(database, job_of(database, 1))
    assert (result.status, result.problem) == ("succeeded", None)
    lacks = [(0, "device-out-of-memory")] * refusals
    assert seen == [(0, None), *lacks, (1, "upstream-unavailable")]


def rewrite(database, change):
    """Every payload as another release would have written it."""
    with database.engine.begin() as connection:
        for row in connection.execute(select(items.c.id, items.c.payload)).all():
            payload = pack(json.dumps(change(json.loads(unpack(row.payload)))).encode())
            connection.execute(update(items).where(items.c.id == row.id).values(payload=payload))


@pytest.mark.parametrize(
    "written",
    [{"mood": "good"}, {"kind": "bake"}, {"version": 2}],
    ids=["field", "kind", "version"],
)
async def test_what_a_later_release_wrote_is_left_to_its_workers(database, written, capsys):
    configure_logs(TelemetrySettings())  # onto the stream that capsys reads
    old, job = Scripted("anchor"), job_of(database, 1, method="asap_stage1")
    rewrite(database, lambda payload: {**payload, **written})
    with database.engine.connect() as connection:
        query = select(items.c.status, items.c.attempt, items.c.problem_code)
        async with host_of(database, old):
            left = ("queued", 0, "not-ready")
            await until(lambda: connection.rollback() or connection.execute(query).one() == left)
    assert old.seen == []
    logged = capsys.readouterr().err
    assert "item.of_another_release" in logged
    assert not {"good", "bake"} & set(re.findall(r"\w+", logged))
    rewrite(database, lambda payload: {k: v for k, v in payload.items() if k not in written})
    new = Scripted("anchor")  # the worker that knows it
    async with host_of(database, new):
        [result] = await ended(database, job)
    assert (result.status, len(new.seen)) == ("succeeded", 1)


async def test_the_deadline_of_the_job_ends_an_item_that_finds_no_capacity(database):
    async def act(record, times):
        raise CapacityError("no memory")

    job, anchor = job_of(database, 2), Scripted("anchor", act)
    async with host_of(database, anchor):
        await until(lambda: len(anchor.seen) >= 4)
        with database.engine.begin() as connection:
            connection.execute(update(jobs).values(expires_at=1))
        ledger = JobLedger(database)
        await until(lambda: {r.status for r in ledger.results("t", job)} == {"failed"})
    codes = [r.problem.code for r in JobLedger(database).results("t", job)]
    assert codes == ["deadline-exceeded"] * 2


async def test_a_crash_is_logged_without_the_text_and_fails_its_item_alone(database, capsys):
    configure_logs(TelemetrySettings())  # onto the stream that capsys reads

    async def act(record, times):
        if record.id.endswith("-1"):
            raise ValueError("planted secret of a trace")

    async with host_of(database, Scripted("anchor", act), Scripted("surprisal")):
        results = await ended(database, job_of(database, 3))
    assert [r.status for r in results] == ["succeeded", "failed", "succeeded"]
    assert results[1].problem.code == "internal-error"
    logged = capsys.readouterr().err
    assert "item.crashed" in logged
    assert "ValueError" in logged
    assert "planted" not in logged


async def test_waiting_is_no_attempt(database):
    async def act(record, times):
        return Wait(record, 0.02) if times < 6 else None

    async with host_of(database, Scripted("anchor", act), Scripted("surprisal")):
        results = await ended(database, job_of(database, 1))
    assert results[0].status == "succeeded"


async def test_a_heartbeat_keeps_an_item_that_takes_longer_than_its_lease(database):
    """Each turn of the item takes two thirds of the lease: the third one has none left."""

    def lease_until():
        with database.read() as connection:
            return connection.execute(select(items.c.lease_until)).scalar_one()

    async def act(record, times):
        for _ in range(3):
            Platform(database).pass_time(400)
            left = lease_until()
            await until(lambda left=left: lease_until() > left)

    anchor = Scripted("anchor", act)
    limits = RunnerLimits(lease_s=600, heartbeat_s=0.1, max_attempts=1)
    host = StageHost(
        database, MemoryQueue(), [anchor, Scripted("surprisal")], limits=limits, sweep_period_s=0.05
    )
    async with host:
        [result] = await ended(database, job_of(database, 1))
    assert result.status == "succeeded"
    assert len(anchor.seen) == 1


async def test_a_timeout_ends_an_item(database):
    async def act(record, times):
        if record.id.endswith("-1"):
            await asyncio.sleep(3600)

    limits = RunnerLimits(timeout_s=0.5, max_attempts=1)
    anchor = Scripted("anchor", act)
    host = StageHost(
        database, MemoryQueue(), [anchor, Scripted("surprisal")], limits=limits, sweep_period_s=0.05
    )
    async with host:
        results = await ended(database, job_of(database, 2))
    assert [r.status for r in results] == ["succeeded", "failed"]
    assert results[1].problem.code == "upstream-timeout"
    assert len(anchor.seen) == 2


async def test_lost_and_doubled_and_foreign_messages_have_no_effect(database):
    class Lossy(MemoryQueue):
        """Loses every second message and repeats the others."""

        calls = 0

        def publish(self, message):
            self.calls += 1
            return True if self.calls % 2 else super().publish(message) and super().publish(message)

    queue = Lossy()
    anchor, surprisal = Scripted("anchor"), Scripted("surprisal")
    async with host_of(database, anchor, surprisal, queue=queue):
        for ids in (("999999",), ("nonsense",), ("1", "1", "2")):
            MemoryQueue.publish(queue, Message("anchor", ids))
        job = job_of(database, 20)
        # what was marked as published and lost comes back after a minute; here it is made due now
        while JobLedger(database).job("t", job).phase != "done":
            await asyncio.sleep(0.1)
            with database.write() as connection:
                connection.execute(update(items).values(published_at=None))
        results = await ended(database, job)
    assert [r.status for r in results] == ["succeeded"] * 20
    assert len(anchor.seen) == len(set(anchor.seen)) == 20


async def test_live_items_do_not_wait_behind_a_long_job(database):
    async def act(record, times):
        if record.id in batch:
            await asyncio.sleep(3600)

    anchor = Scripted("anchor", act, concurrency=5)
    async with host_of(database, anchor, Scripted("surprisal")):
        job = job_of(database, 200)
        batch = {f"{job[:4]}-{i}" for i in range(200)}
        await until(lambda: anchor.running == 4)  # all slots but the one for live items
        [result] = await ended(database, job_of(database, 1, priority=LIVE))
        assert result.status == "succeeded"
        assert JobLedger(database).job("t", job).phase == "running"
        assert anchor.most == 5


async def test_leaving_gives_the_leases_back_at_once(database):
    async def act(record, times):
        await asyncio.sleep(3600)

    job, anchor = job_of(database, 5), Scripted("anchor", act)
    async with host_of(database, anchor, Scripted("surprisal")):
        await until(lambda: anchor.running == 5)
    counts = JobLedger(database).job("t", job).counts
    assert [(c.stage, c.status, c.items) for c in counts] == [("anchor", "queued", 5)]
    async with host_of(database, Scripted("anchor"), Scripted("surprisal")):
        assert len(await ended(database, job)) == 5


async def test_leaving_while_a_claim_is_under_way_gives_its_leases_back(database, monkeypatch):
    claiming, left, claim = threading.Event(), threading.Event(), JobStore.claim

    def slow(self, *arguments):
        claiming.set()
        assert left.wait(PATIENCE_S)
        return claim(self, *arguments)

    class Left(MemoryQueue):
        async def drain(self):
            asyncio.get_running_loop().call_later(0.1, left.set)  # behind the cancelling
            await super().drain()

    monkeypatch.setattr(JobStore, "claim", slow)
    job, anchor = job_of(database, 3), Scripted("anchor")
    async with host_of(database, anchor, queue=Left()):
        await asyncio.to_thread(claiming.wait, PATIENCE_S)
    view = JobLedger(database).job("t", job)
    counts = [(count.stage, count.status, count.items) for count in view.counts]
    assert counts == [("anchor", "queued", 3)]
    assert anchor.seen == []


async def test_without_a_broker_the_work_goes_on(database, monkeypatch):
    class Dead(MemoryQueue):
        def publish(self, message):
            return False

        def healthy(self):
            return False

    monkeypatch.setattr("asap_runtime.host.POLL_S", 0.05)
    async with host_of(database, Scripted("anchor"), Scripted("surprisal"), queue=Dead()):
        results = await ended(database, job_of(database, 30))
    assert [r.status for r in results] == ["succeeded"] * 30


async def test_a_cancelled_job_stops_its_running_work(database):
    stopped = []

    async def act(record, times):
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            stopped.append(record.id)
            raise

    anchor = Scripted("anchor", act)
    async with host_of(database, anchor, Scripted("surprisal")):
        job = job_of(database, 6)
        await until(lambda: anchor.running == 6)
        JobLedger(database).cancel("t", job)
        results = await ended(database, job)
        await until(lambda: len(stopped) == 6)
    assert {result.status for result in results} == {"cancelled"}


def cost_of(database, job):
    return JobLedger(database).job("t", job).cost


async def test_what_an_item_cost_is_booked_however_its_work_ends(database):
    async def act(record, times):
        spend(0.01)
        match record.id[-1], times:
            case "1", 1 | 2:
                raise UpstreamUnavailable("busy")
            case "2", _:
                raise InvalidInput("wrong", code="no-code")
            case "3", _:
                await asyncio.sleep(3600)
            case "4", _:
                raise ValueError("a defect")
            case "5", 1:
                return Wait(record, 0.01)

    anchor = Scripted("anchor", act)
    limits = RunnerLimits(
        lease_s=60, heartbeat_s=0.1, timeout_s=0.5, max_attempts=3, backoff_base_s=0.01
    )
    host = StageHost(
        database, MemoryQueue(), [anchor, Scripted("surprisal")], limits=limits, sweep_period_s=0.05
    )
    async with host:
        job = job_of(database, 6)
        await ended(database, job)
    costs = [item.cost for item in JobLedger(database).items("t", job)]
    assert costs == [10_000, 30_000, 10_000, 30_000, 10_000, 20_000]
    assert cost_of(database, job) == sum(costs)


async def test_what_stopped_work_cost_is_booked_once(database):
    async def act(record, times):
        spend(0.01)
        await asyncio.sleep(3600)

    anchor = Scripted("anchor", act)
    async with host_of(database, anchor, Scripted("surprisal")):
        cancelled = job_of(database, 3)
        await until(lambda: anchor.running == 3)
        JobLedger(database).cancel("t", cancelled)
        await ended(database, cancelled)
        await until(lambda: cost_of(database, cancelled) == 30_000)  # the work hears of it
        left = job_of(database, 2)
        await until(lambda: len(anchor.seen) == 5)
    assert cost_of(database, left) == 20_000
    assert cost_of(database, cancelled) == 30_000


async def test_a_cost_cap_ends_the_job_cleanly_with_what_was_paid(database):
    job, spent = job_of(database, 200, ingested=False), 0

    async def act(record, times):
        nonlocal spent
        # However long the bookings take, a slot's worth of them is under way at a time.
        await until(lambda: 10_000 * (spent - anchor.concurrency) <= cost_of(database, job))
        spend(0.01)
        spent += record.id.startswith(job[:4])

    anchor = Scripted("anchor", act, concurrency=4)
    async with host_of(database, anchor, Scripted("surprisal")):
        with database.write() as connection:
            connection.execute(update(jobs).where(jobs.c.id == job).values(cost_cap=200_000))
        JobIntake(database).mark_ingested(job)
        results = await ended(database, job)
        other = await ended(database, job_of(database, 5))
    assert [r.status for r in other] == ["succeeded"] * 5
    assert len(results) == 200
    done = [r for r in results if r.status == "succeeded"]
    stopped = [r for r in results if r.status == "failed"]
    assert len(done) + len(stopped) == 200
    assert {r.problem.code for r in stopped} == {"cost-cap-reached"}
    assert cost_of(database, job) == 10_000 * len(done) == 10_000 * (len(anchor.seen) - 5)
    # 20 reach the cap; more than that only what ran, or was being booked, at that moment
    assert 20 <= len(done) <= 20 + 4 * anchor.concurrency
