"""The worker's side of the job store, on every database."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from asap.errors import UpstreamUnavailable
from asap_runtime.values import ItemProblem, Outcome
from job_store import PROBLEM, TENANT, drain, drain_messages

ITEMS = 2000


def test_four_processes_claim_each_item_exactly_once(platform, database_url, racers):
    job_id = platform.job(ITEMS)
    runs = [racers.submit(drain, database_url, f"worker-{n}") for n in range(4)]
    claimed = Counter(item for run in runs for item in run.result())
    assert all(run.result() for run in runs), "each had its part"
    assert set(claimed.values()) == {1}
    assert len(claimed) == ITEMS
    assert platform.statuses(job_id) == ["succeeded"] * ITEMS


def test_a_message_that_four_processes_get_is_run_by_one(platform, database_url, racers):
    platform.job(ITEMS)
    ids = platform.ids()
    messages = [ids[start : start + 64] for start in range(0, ITEMS, 64)]
    # Overlapping messages in different orders: row locks taken out of order would deadlock.
    orders = [messages, messages[::-1], [m[::-1] for m in messages], messages[7:] + messages[:7]]
    runs = [
        racers.submit(drain_messages, database_url, f"worker-{n}", order)
        for n, order in enumerate(orders)
    ]
    claimed = Counter(item for run in runs for item in run.result())
    assert claimed == dict.fromkeys(ids, 1)


def test_a_claim_carries_what_the_stage_needs(platform):
    job_id = platform.job(2, priority=0, trace="00-ab-cd-01")
    first, second = platform.store.claim(platform.ids()[::-1], "one", "worker")
    assert (first.position, second.position) == (0, 1)
    assert first.payload == b'{"n":1}'
    assert (first.job_id, first.stage, first.owner) == (job_id, "one", "worker")
    assert (first.attempt, first.fence, first.priority) == (0, 1, 0)
    assert first.trace == "00-ab-cd-01"


def test_redelivered_unknown_and_foreign_ids_claim_nothing(platform):
    platform.job(3)
    ids = platform.ids()
    assert len(platform.store.claim([*ids, ids[0], 10**9], "one", "worker")) == 3
    assert platform.store.claim(ids, "one", "worker") == []
    assert platform.store.claim([], "one", "worker") == []
    platform.store.release(platform.claim())
    assert platform.store.claim(ids, "other", "worker") == []


def test_a_claim_is_bounded(platform):
    with pytest.raises(ValueError, match="64"):
        platform.store.claim(range(65), "one", "worker")
    platform.job(70)
    assert len(platform.claim(1000)) == 64


def test_claims_go_by_priority_then_take_turns_between_jobs(platform):
    slow = platform.job(3, priority=5)
    other = platform.job(2, priority=5)
    live = platform.job(1, priority=0)
    order = [claim.job_id for _ in range(6) for claim in platform.claim(1)]
    assert order[0] == live
    assert set(order[1:3]) == {slow, other}
    assert set(order[3:5]) == {slow, other}
    assert order[5] == slow


def test_claims_take_turns_between_tenants(platform):
    """The way without a broker is as fair as the messages are."""
    platform.job(10_000, tenant="big")
    small = platform.job(10, tenant="small")
    platform.job(2, tenant="big", priority=0)
    claims = platform.claim(24)
    assert [claim.priority for claim in claims[:2]] == [0, 0]
    assert sum(claim.job_id == small for claim in claims) == 10
    assert len(claims) == 24


def test_the_route_is_walked_stage_by_stage(platform):
    job_id = platform.job()
    (first,) = platform.claim()
    platform.store.retry(first, PROBLEM, 0)
    (first,) = platform.claim()
    assert platform.store.advance(first, b'{"n":1,"coarse":1}', "two")
    assert platform.claim() == []
    assert [due.id for due in platform.sweep.due("two", 10)] == [first.id]
    (second,) = platform.claim(stage="two")
    assert (second.payload, second.attempt) == (b'{"n":1,"coarse":1}', 0)
    assert second.fence == first.fence + 1
    assert platform.store.advance(second, b'{"n":1,"fine":1}', None)
    (result,) = platform.results(job_id)
    assert (result.status, result.payload, result.problem) == (
        "succeeded",
        b'{"n":1,"fine":1}',
        None,
    )


def test_waiting_is_not_an_attempt_and_honours_not_before(platform):
    platform.job()
    (claim,) = platform.claim()
    assert platform.store.wait(claim, b'{"launched":1}', 60)
    assert platform.claim() == platform.ids() == []
    assert platform.store.claim([claim.id], "one", "worker") == []
    platform.pass_time(61)
    (again,) = platform.claim()
    assert (again.attempt, again.payload, again.fence) == (0, b'{"launched":1}', 2)


def test_a_retry_counts_and_keeps_its_problem(platform):
    job_id = platform.job()
    for attempt in range(3):
        (claim,) = platform.claim()
        assert claim.attempt == attempt
        assert platform.store.retry(claim, PROBLEM, 30)
        assert platform.claim() == []
        platform.pass_time(31)
    (item,) = platform.ledger.items(TENANT, job_id)
    assert (item.status, item.attempt, item.problem) == ("queued", 3, PROBLEM)
    (claim,) = platform.claim()
    platform.store.release([claim])
    (item,) = platform.ledger.items(TENANT, job_id)
    assert item.problem == PROBLEM


def test_a_failed_item_keeps_its_problem_and_is_final(platform):
    job_id = platform.job()
    (claim,) = platform.claim()
    assert platform.store.fail(claim, PROBLEM)
    assert platform.claim() == []
    (result,) = platform.results(job_id)
    assert (result.status, result.payload, result.problem) == ("failed", None, PROBLEM)


def test_a_release_is_due_at_once_and_costs_nothing(platform):
    platform.job(2)
    claims = platform.claim()
    assert platform.store.release(claims) == {claim.id for claim in claims}
    assert [claim.attempt for claim in platform.claim()] == [0, 0]


@pytest.mark.parametrize(
    "outcome",
    [
        lambda claim: Outcome.done(claim, b"{}", None),
        lambda claim: Outcome.done(claim, b"{}", "two"),
        lambda claim: Outcome.wait(claim, b"{}", 1),
        lambda claim: Outcome.retry(claim, ItemProblem("x", "y"), 1),
        lambda claim: Outcome.fail(claim, ItemProblem("x", "y")),
        Outcome.release,
    ],
    ids=["succeed", "advance", "wait", "retry", "fail", "release"],
)
def test_a_stale_write_changes_nothing(platform, outcome):
    job_id = platform.job()
    (stale,) = platform.claim(lease_s=-1)
    platform.sweep.expire_leases(10)
    assert platform.store.finish([outcome(stale)]) == set()
    (current,) = platform.claim()
    before = platform.ledger.items(TENANT, job_id)
    assert platform.store.finish([outcome(stale)]) == set()
    assert platform.store.heartbeat([stale]) == set()
    assert platform.ledger.items(TENANT, job_id) == before
    assert platform.store.finish([outcome(stale), outcome(current)]) == {current.id}


def test_a_doubled_outcome_is_written_once(platform):
    job_id = platform.job()
    (claim,) = platform.claim()
    assert platform.store.advance(claim, b"1", None)
    assert not platform.store.advance(claim, b"2", None)
    assert [result.payload for result in platform.results(job_id)] == [b"1"]


def test_another_owner_with_the_same_fence_writes_nothing(platform):
    """After a restored backup two workers may hold one fence."""
    platform.job()
    (claim,) = platform.claim()
    assert not platform.store.advance(replace(claim, owner="before the backup"), b"{}", None)


def test_a_batch_may_mix_outcomes(platform):
    job_id = platform.job(5)
    claims = platform.claim()
    touched = platform.store.finish(
        [
            Outcome.done(claims[0], b"{}", None),
            Outcome.done(claims[1], b"{}", "two"),
            Outcome.wait(claims[2], b"{}", 60),
            Outcome.fail(claims[3], PROBLEM),
            Outcome.release(claims[4]),
        ]
    )
    assert touched == {claim.id for claim in claims}
    assert platform.statuses(job_id) == ["succeeded", "queued", "queued", "failed", "queued"]


def test_a_heartbeat_keeps_the_lease(platform):
    platform.job(2)
    claims = platform.claim(lease_s=1000)
    platform.pass_time(800)
    assert platform.store.heartbeat(claims[:1], 1000) == {claims[0].id}
    platform.pass_time(800)
    assert platform.sweep.expire_leases(10).requeued == 1
    assert platform.store.heartbeat(claims) == {claims[0].id}
    assert platform.store.heartbeat([]) == set()


def test_cancel_stops_claims_and_late_writes_fail(platform):
    job_id = platform.job(3)
    ids = platform.ids()
    (claim,) = platform.claim(1)
    assert platform.ledger.cancel(TENANT, job_id)
    assert platform.claim() == []
    assert platform.store.claim(ids, "one", "worker") == []
    assert platform.store.heartbeat([claim]) == set()
    assert not platform.store.advance(claim, b"{}", None)
    assert platform.statuses(job_id) == ["cancelled"] * 3


def test_work_begins_when_all_items_are_in(platform):
    job_id = platform.job(3, ingested=False)
    assert platform.ids() == platform.claim() == []
    assert platform.intake.mark_ingested(job_id)
    assert len(platform.claim()) == 3


@pytest.mark.contract
@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_a_restarted_server_loses_no_claim(platform, postgres_server):
    platform.job(2)
    first, second = platform.claim()
    postgres_server.stop()
    with pytest.raises(UpstreamUnavailable) as caught:
        platform.store.advance(first, b"{}", None)
    assert caught.value.problem_code == "database-unavailable"
    postgres_server.start()
    assert platform.store.advance(first, b"{}", None)
    assert platform.store.heartbeat([first, second]) == {second.id}
