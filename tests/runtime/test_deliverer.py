"""Ended jobs on SQLite, reported to a real HTTPS server."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest
from sqlalchemy import select, update
from structlog.testing import capture_logs

from asap_runtime.database import Database, open_engine
from asap_runtime.deliverer import Deliverer
from asap_runtime.logs import configure_logs
from asap_runtime.migrate import upgrade
from asap_runtime.settings import TelemetrySettings
from asap_runtime.tables import deliveries, jobs
from asap_runtime.values import ItemProblem
from asap_runtime.webhooks import WebhookCaller, WebhookSettings, is_public, signature
from job_store import PROBLEM, TENANT, Platform
from waiting import PATIENCE_S
from webhook_receiver import SECRET, Receiver, in_turn, receiving, status

PATH = "/hook?token=very-secret-path"


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """No call is given up, and no next try is due, because this machine is busy."""
    monkeypatch.setattr("asap_runtime.webhooks.TIMEOUT_S", PATIENCE_S)
    monkeypatch.setattr("asap_runtime.webhooks.CONNECT_S", PATIENCE_S)
    monkeypatch.setattr("asap_runtime.deliveries.DELAYS_S", (1800.0,) * 4)


@pytest.fixture
def platform(tmp_path):
    configure_logs(TelemetrySettings(log_json=True))
    url = f"sqlite:///{tmp_path}/asap.db"
    upgrade(url)
    database = Database(open_engine(url))
    yield Platform(database)
    database.close()


def ended(platform, receiver: Receiver, size: int = 0) -> str:
    """A job that is reported to the receiver; its first item succeeded, the second failed."""
    job_id = platform.job(size, ingested=size == 0)
    with platform.database.write() as connection:
        url = receiver.url(PATH)
        connection.execute(update(jobs).where(jobs.c.id == job_id).values(webhook=url))
    if size:
        platform.intake.mark_ingested(job_id)
        first, *others = platform.claim()
        platform.store.advance(first, b'{"cot":"a text of the trace"}', None)
        for claim in others:
            platform.store.fail(claim, PROBLEM)
    assert platform.sweep.finish_jobs(10) == 1
    return job_id


def deliverer(platform, receiver: Receiver, period_s: float = 0.01) -> Deliverer:
    return Deliverer(
        platform.database, receiver.settings(), caller=receiver.caller(), period_s=period_s
    )


def row(platform, job_id):
    with platform.database.read() as connection:
        found = connection.execute(select(deliveries).where(deliveries.c.job_id == job_id))
        return found.mappings().one()


def make_due(platform) -> None:
    with platform.database.write() as connection:
        connection.execute(update(deliveries).values(not_before=0))


async def test_the_end_of_a_job_is_reported_once(platform):
    async with receiving(status(204)) as receiver:
        job_id = ended(platform, receiver, 3)
        loop = deliverer(platform, receiver)
        assert await loop.deliver() == 1
        make_due(platform)
        assert await loop.deliver() == 0
    [request] = receiver.requests
    finished_at = platform.ledger.job(TENANT, job_id).facts.finished_at
    assert json.loads(request.body) == {
        "type": "job.ended",
        "id": f"{job_id}.{finished_at}",
        "created_at": finished_at / 1e6,
        "job": {
            "id": job_id,
            "kind": "prune",
            "phase": "done",
            "total": 3,
            "succeeded": 1,
            "failed": 2,
            "cancelled": 0,
            "problems": 0,
        },
    }
    assert request.headers["asap-event-id"] == f"{job_id}.{finished_at}"
    sent_at = int(request.headers["asap-signature"].split(",")[0].removeprefix("t="))
    assert request.headers["asap-signature"] == signature(SECRET, sent_at, request.body)
    assert (row(platform, job_id)["outcome"], row(platform, job_id)["attempt"]) == ("delivered", 1)


async def test_a_rejected_job_says_how_many_lines_were_wrong(platform):
    async with receiving(status(200)) as receiver:
        job_id = platform.job(ingested=False, size=0)
        wrong = [ItemProblem("invalid-input", f"line {n}: a text of the trace") for n in (1, 2)]
        platform.intake.reject(job_id, wrong)
        with platform.database.write() as connection:
            connection.execute(update(jobs).values(webhook=receiver.url()))
        platform.sweep.finish_jobs(10)
        await deliverer(platform, receiver).deliver()
    [request] = receiver.requests
    event = json.loads(request.body)
    assert (event["job"]["phase"], event["job"]["problems"]) == ("rejected", 2)
    assert b"trace" not in request.body


async def test_a_failure_is_tried_again_as_the_same_event(platform):
    answers = in_turn(status(500), status(302, "Location: https://evil.example/"), status(200))
    async with receiving(answers) as receiver:
        job_id = ended(platform, receiver)
        loop = deliverer(platform, receiver)
        outcomes = []
        for _ in range(3):
            assert await loop.deliver() == 1
            outcomes.append(row(platform, job_id)["outcome"])
            assert await loop.deliver() == 0
            make_due(platform)
    assert outcomes == ["retry: 500", "retry: 302", "delivered"]
    assert len({request.headers["asap-event-id"] for request in receiver.requests}) == 1
    assert len({request.body for request in receiver.requests}) == 1
    assert len(receiver.requests) == 3


async def test_five_failures_are_the_end(platform):
    async with receiving(status(500)) as receiver:
        job_id = ended(platform, receiver)
        loop = deliverer(platform, receiver)
        for _ in range(7):
            await loop.deliver()
            make_due(platform)
    assert len(receiver.requests) == 5
    assert row(platform, job_id)["outcome"] == "gave-up: 500"


async def test_a_receiver_that_is_gone_is_left_alone(platform):
    async with receiving(status(410)) as receiver:
        job_id = ended(platform, receiver)
        loop = deliverer(platform, receiver)
        for _ in range(2):
            await loop.deliver()
            make_due(platform)
    assert len(receiver.requests) == 1
    assert row(platform, job_id)["outcome"] == "stopped: 410"


async def test_a_refused_address_is_the_end(platform):
    async with receiving(status(200)) as receiver:
        job_id = ended(platform, receiver)
        caller = receiver.caller(may_call=is_public)
        loop = Deliverer(platform.database, receiver.settings(), caller=caller)
        assert await loop.deliver() == 1
    assert receiver.connections == 0
    assert row(platform, job_id)["outcome"] == "refused: private address"
    assert row(platform, job_id)["ended_at"] is not None


async def test_a_second_end_is_a_second_event(platform):
    async with receiving(status(200)) as receiver:
        job_id = ended(platform, receiver, 2)
        loop = deliverer(platform, receiver)
        await loop.deliver()
        platform.ledger.retry_failed(TENANT, job_id)
        make_due(platform)
        assert await loop.deliver() == 0
        platform.store.advance(platform.claim()[0], b"{}", None)
        platform.sweep.finish_jobs(10)
        assert await loop.deliver() == 1
    first, second = (json.loads(request.body) for request in receiver.requests)
    assert first["id"] != second["id"]
    assert (first["job"]["failed"], second["job"]["failed"]) == (1, 0)


def end_again(platform, job_id):
    platform.ledger.retry_failed(TENANT, job_id)
    platform.store.advance(platform.claim()[0], b"{}", None)
    platform.sweep.finish_jobs(10)


@pytest.mark.parametrize(
    ("change", "calls"),
    [
        (lambda platform, job_id: platform.ledger.delete(TENANT, job_id), 0),
        (lambda platform, job_id: platform.ledger.retry_failed(TENANT, job_id), 0),
        (end_again, 1),
    ],
    ids=["deleted", "opened again", "ended again"],
)
async def test_a_job_that_moved_on_after_the_claim(platform, monkeypatch, change, calls):
    async with receiving(status(200)) as receiver:
        job_id = ended(platform, receiver, 2)
        loop = deliverer(platform, receiver)
        claim = loop._deliveries.claim

        def claim_then_change(limit):
            claimed = claim(limit)
            change(platform, job_id)
            return claimed

        monkeypatch.setattr(loop._deliveries, "claim", claim_then_change)
        with capture_logs() as events:
            assert await loop.deliver() == 1
        assert (receiver.connections, events) == (0, [])
        monkeypatch.undo()
        assert await loop.deliver() == calls
        assert len(receiver.requests) == calls


async def test_one_slow_receiver_does_not_hold_up_the_others_of_its_pass(platform):
    answered = asyncio.Event()

    async def slow(writer):
        await answered.wait()
        await status(200)(writer)

    async def fast(writer):
        answered.set()
        await status(200)(writer)

    async with receiving(in_turn(slow, fast)) as receiver:
        job_ids = [ended(platform, receiver) for _ in range(2)]
        assert await deliverer(platform, receiver).deliver() == 2
    assert {row(platform, job_id)["outcome"] for job_id in job_ids} == {"delivered"}


async def test_the_loop_delivers_and_survives_trouble(platform, monkeypatch):
    async with receiving(status(200)) as receiver:
        job_ids = [ended(platform, receiver) for _ in range(3)]
        loop = deliverer(platform, receiver)
        claim, calls = loop._deliveries.claim, []

        done = asyncio.Event()
        turn = asyncio.get_running_loop()

        def troubled(limit):
            calls.append(limit)
            if len(calls) == 1:
                raise OSError("the database is away")
            claimed = claim(1)
            if not claimed:  # the passes before have saved what they did
                turn.call_soon_threadsafe(done.set)
            return claimed

        monkeypatch.setattr(loop._deliveries, "claim", troubled)
        task = asyncio.create_task(loop.run())
        await done.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert {row(platform, job_id)["outcome"] for job_id in job_ids} == {"delivered"}
    assert len(receiver.requests) == 3


async def test_a_full_pass_is_followed_by_the_next_at_once(platform, monkeypatch):
    monkeypatch.setattr("asap_runtime.deliverer.AT_ONCE", 1)
    called = asyncio.Event()

    async def second(writer):
        called.set()
        await status(200)(writer)

    async with receiving(in_turn(status(200), second)) as receiver:
        for _ in range(2):
            ended(platform, receiver)
        loop = deliverer(platform, receiver, period_s=3600)
        task = asyncio.create_task(loop.run())
        await called.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_trouble_of_ours_leaves_the_delivery_to_its_lease(platform, monkeypatch):
    async with receiving(status(200)) as receiver:
        job_ids = [ended(platform, receiver) for _ in range(2)]
        loop = deliverer(platform, receiver)
        job = loop._ledger.job

        def troubled(tenant, job_id):
            if job_id == job_ids[0]:
                raise OSError("the database is away")
            return job(tenant, job_id)

        monkeypatch.setattr(loop._ledger, "job", troubled)
        assert await loop.deliver() == 2
        assert [row(platform, job_id)["outcome"] for job_id in job_ids] == [None, "delivered"]
        monkeypatch.undo()
        assert await loop.deliver() == 0
        make_due(platform)
        assert await loop.deliver() == 1
    assert row(platform, job_ids[0])["outcome"] == "delivered"


async def test_without_hosts_nothing_runs(platform):
    settings = WebhookSettings()
    await Deliverer(platform.database, settings, caller=WebhookCaller(settings)).run()


async def test_neither_url_nor_secret_nor_answer_is_logged(platform, caplog):
    caplog.set_level(logging.INFO)
    answers = in_turn(status(500, "X-Said: by-the-receiver"), status(200))
    async with receiving(answers) as receiver:
        ended(platform, receiver)
        loop = deliverer(platform, receiver)
        with capture_logs() as events:
            for _ in range(2):
                await loop.deliver()
                make_due(platform)
    assert [(event["event"], event["reason"]) for event in events] == [
        ("webhook.called", "500"),
        ("webhook.called", "200"),
    ]
    shown = f"{caplog.text}{events}"
    for secret in ("very-secret-path", SECRET, "by-the-receiver"):
        assert secret not in shown
