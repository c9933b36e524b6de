"""The table of webhook deliveries, on every database."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from sqlalchemy import select, update
from sqlalchemy.exc import SQLAlchemyError

from asap.errors import UpstreamUnavailable
from asap_runtime.database import SECOND
from asap_runtime.deliveries import DELAYS_S, LEASE_S, TRIES, Deliveries, Delivery
from asap_runtime.tables import deliveries, jobs
from asap_runtime.values import ItemProblem
from job_store import PROBLEM, TENANT

URL = "https://hooks.example/ended"


@pytest.fixture
def table(database) -> Deliveries:
    return Deliveries(database)


def with_webhook(platform, size=0, url=URL, **options) -> str:
    job_id = platform.job(size, **options)
    with platform.database.write() as connection:
        connection.execute(update(jobs).where(jobs.c.id == job_id).values(webhook=url))
    return job_id


def ended(platform, count=1) -> list[str]:
    job_ids = [with_webhook(platform) for _ in range(count)]
    assert platform.sweep.finish_jobs(100) == count
    return job_ids


def row(platform, job_id):
    with platform.database.read() as connection:
        found = connection.execute(select(deliveries).where(deliveries.c.job_id == job_id))
        return found.mappings().one_or_none()


def pass_time(platform, seconds: float) -> None:
    """Move the moments of all deliveries back: the database's clock cannot be turned."""
    with platform.database.write() as connection:
        back = deliveries.c.not_before - round(seconds * SECOND)
        connection.execute(update(deliveries).values(not_before=back))


def test_the_end_of_a_job_with_a_webhook_is_due_at_once(platform, table):
    job_id = with_webhook(platform, 1)
    platform.job(0)
    assert platform.sweep.finish_jobs(10) == 1
    assert table.claim(10) == []
    platform.store.fail(platform.claim()[0], PROBLEM)
    assert platform.sweep.finish_jobs(10) == 1
    [delivery] = table.claim(10)
    finished_at = platform.ledger.job(TENANT, job_id).facts.finished_at
    expected = (job_id, TENANT, URL, finished_at, 1)
    assert (
        delivery.job_id,
        delivery.tenant,
        delivery.url,
        delivery.finished_at,
        delivery.attempt,
    ) == expected


def test_rejected_and_cancelled_jobs_are_reported_too(platform, table):
    rejected = with_webhook(platform, ingested=False)
    platform.intake.reject(rejected, [ItemProblem("invalid-input", "unreadable")])
    cancelled = with_webhook(platform, 3)
    platform.ledger.cancel(TENANT, cancelled)
    platform.sweep.finish_jobs(10)
    assert {delivery.job_id for delivery in table.claim(10)} == {rejected, cancelled}


def test_a_job_does_not_end_without_its_delivery(platform, table):
    job_id = with_webhook(platform)
    with platform.database.write() as connection:
        deliveries.drop(connection)
    with pytest.raises((SQLAlchemyError, UpstreamUnavailable)):
        platform.sweep.finish_jobs(10)
    assert platform.ledger.job(TENANT, job_id).facts.finished_at is None


def test_a_claim_is_exclusive_until_its_lease_ends(platform, table):
    [job_id] = ended(platform)
    [first] = table.claim(10)
    assert table.claim(10) == []
    pass_time(platform, LEASE_S / 2)
    assert table.claim(10) == []
    pass_time(platform, LEASE_S / 2)
    [second] = table.claim(10)
    assert (second.job_id, second.attempt) == (job_id, 2)
    assert not table.end(first, "delivered")
    assert not table.fail(first, "500")
    assert row(platform, job_id)["ended_at"] is None
    assert table.end(second, "delivered")
    assert not table.fail(second, "500")
    assert row(platform, job_id)["outcome"] == "delivered"


def test_claims_are_bounded_and_oldest_first(platform, table):
    ended(platform, 5)
    with platform.database.write() as connection:
        ids = connection.execute(select(deliveries.c.job_id)).scalars().all()
        for age, job_id in enumerate(ids):
            connection.execute(
                update(deliveries).where(deliveries.c.job_id == job_id).values(not_before=-age)
            )
    claimed = [{delivery.job_id for delivery in table.claim(2)} for _ in range(4)]
    assert claimed == [{ids[4], ids[3]}, {ids[2], ids[1]}, {ids[0]}, set()]


def test_a_failure_is_tried_again_after_growing_delays_then_given_up(platform, table):
    [job_id] = ended(platform)
    for attempt, delay_s in enumerate(DELAYS_S, 1):
        [delivery] = table.claim(10)
        assert delivery.attempt == attempt
        before = platform.database.time()
        assert table.fail(delivery, "500")
        due, after = row(platform, job_id)["not_before"], platform.database.time()
        assert before + 0.75 * delay_s * SECOND <= due <= after + 1.25 * delay_s * SECOND
        assert row(platform, job_id)["outcome"] == "retry: 500"
        pass_time(platform, -60)  # 10 s are soon over where a machine stands still
        assert table.claim(10) == []
        pass_time(platform, 60 + 1.25 * delay_s)
    [last] = table.claim(10)
    assert last.attempt == TRIES == 5
    assert table.fail(last, "timeout")
    assert row(platform, job_id)["outcome"] == "gave-up: timeout"
    assert row(platform, job_id)["ended_at"] is not None
    pass_time(platform, 1e6)
    assert table.claim(10) == []


def test_a_delivery_that_kills_each_of_its_callers_has_an_end(platform, table):
    [job_id] = ended(platform)
    for _ in range(TRIES):
        assert [delivery.job_id for delivery in table.claim(10)] == [job_id]
        pass_time(platform, LEASE_S)
    [other] = ended(platform)
    assert [delivery.job_id for delivery in table.claim(10)] == [other]
    assert row(platform, job_id)["outcome"] == "gave-up: interrupted"
    assert row(platform, job_id)["attempt"] == TRIES


@pytest.mark.parametrize("before", ["unclaimed", "claimed", "delivered"])
def test_a_job_that_ends_again_is_reported_again(platform, table, before):
    job_id = with_webhook(platform, 1)
    platform.store.fail(platform.claim()[0], PROBLEM)
    platform.sweep.finish_jobs(10)
    old: Delivery | None = None
    if before != "unclaimed":
        [old] = table.claim(10)
    if before == "delivered":
        table.end(old, "delivered")
    assert platform.ledger.retry_failed(TENANT, job_id) == 1
    pass_time(platform, LEASE_S)
    assert table.claim(10) == []  # nothing to report while it is open
    platform.store.advance(platform.claim()[0], b"{}", None)
    platform.sweep.finish_jobs(10)
    if old is not None:  # not even at the very moment when its lease would have ended
        same_moment = replace(old, lease_until=row(platform, job_id)["not_before"])
        assert not table.end(same_moment, "delivered")
    [new] = table.claim(10)
    assert new.attempt == 1
    assert new.finished_at == platform.ledger.job(TENANT, job_id).facts.finished_at
    if old is not None:
        assert new.finished_at > old.finished_at
        assert not table.end(old, "delivered")
        assert not table.fail(old, "500")
    assert table.end(new, "delivered")


def test_a_deleted_job_has_no_delivery(platform, table):
    claimed, waiting = ended(platform, 2)
    [delivery] = table.claim(1)
    for job_id in (claimed, waiting):
        assert platform.ledger.delete(TENANT, job_id)
        assert row(platform, job_id) is None
    assert not table.end(delivery, "delivered")
    assert table.claim(10) == []


def test_of_eight_callers_each_delivery_goes_to_one(platform, table):
    job_ids = ended(platform, 60)

    def drain(_: int) -> list[str]:
        seen: list[str] = []
        while claims := table.claim(4):
            seen += [claim.job_id for claim in claims]
            for claim in claims:
                assert table.end(claim, "delivered")
        return seen

    with ThreadPoolExecutor(8) as pool:
        seen = Counter(job_id for ids in pool.map(drain, range(8)) for job_id in ids)
    # A claim that finds all due rows locked ends its caller early: some may be left, none doubled.
    seen.update(drain(0))
    assert seen == Counter(job_ids)


@pytest.mark.contract
@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_a_claim_does_not_wait_for_another(platform, table):
    ended(platform, 2)
    locked = select(deliveries.c.job_id).limit(1).with_for_update()
    with platform.database.write() as connection:
        held = connection.execute(locked).scalar_one()
        [other] = table.claim(10)
    assert other.job_id != held


def test_a_job_without_a_webhook_leaves_no_row(platform, table):
    job_id = platform.job(0)
    platform.sweep.finish_jobs(10)
    assert row(platform, job_id) is None
