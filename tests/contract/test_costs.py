"""Money in the job store: what is booked where, and how a cap ends a job, on every database."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from sqlalchemy import update

from asap.errors import CostCapReached
from asap_runtime.tables import jobs
from asap_runtime.values import NewItem, Outcome
from job_store import PROBLEM, TENANT


def capped(platform, size, cap, stage="anchor"):
    """A job of that size which may cost so many micro-dollars."""
    job_id = platform.job(size, stage=stage)
    with platform.database.write() as connection:
        connection.execute(update(jobs).where(jobs.c.id == job_id).values(cost_cap=cap))
    return job_id


def costing(outcome, cost):
    return replace(outcome, cost=cost)


def cost_of(platform, job_id):
    return platform.ledger.job(TENANT, job_id).cost


def item_costs(platform, job_id):
    return [item.cost for item in platform.ledger.items(TENANT, job_id)]


def spend(platform, cost, **options):
    """Run one item of the anchor stage to its end at that price."""
    [claim] = platform.claim(1, "anchor", **options)
    platform.store.finish([costing(Outcome.done(claim, b"{}", None), cost)])


def test_every_outcome_books_what_it_cost(platform):
    job_id = platform.job(5, stage="anchor")
    done, wait, retry, fail, release = platform.claim(5, "anchor")
    outcomes = [
        Outcome.done(done, b"{}", "surprisal"),
        Outcome.wait(wait, b"{}", 0),
        Outcome.retry(retry, PROBLEM, 0),
        Outcome.fail(fail, PROBLEM),
        Outcome.release(release),
    ]
    platform.store.finish([costing(outcome, 10**n) for n, outcome in enumerate(outcomes)])
    assert item_costs(platform, job_id) == [1, 10, 100, 1000, 10_000]
    assert cost_of(platform, job_id) == 11_111


def test_attempts_and_stages_of_an_item_add_up(platform):
    job_id, other = platform.job(1, stage="anchor"), platform.job(1, stage="elsewhere")
    for kind in (Outcome.release, lambda claim: Outcome.retry(claim, PROBLEM, 0)):
        [claim] = platform.claim(1, "anchor")
        platform.store.finish([costing(kind(claim), 7)])
    spend(platform, 100)
    assert item_costs(platform, job_id) == [114]
    assert cost_of(platform, job_id) == 114
    assert cost_of(platform, other) == 0


def test_money_of_a_lost_claim_is_the_jobs_though_its_outcome_is_dropped(platform):
    job_id = platform.job(1, stage="anchor")
    [late] = platform.claim(1, "anchor", lease_s=0)
    platform.pass_time(1)
    platform.sweep.expire_leases(10)
    [claim] = platform.claim(1, "anchor")
    assert platform.store.finish([costing(Outcome.done(late, b'{"late":1}', None), 30)]) == set()
    platform.store.finish([costing(Outcome.done(claim, b"{}", None), 5)])
    assert item_costs(platform, job_id) == [5]
    assert cost_of(platform, job_id) == 35
    assert [result.payload for result in platform.results(job_id)] == [b"{}"]


def test_costs_of_a_deleted_job_go_nowhere(platform):
    job_id = platform.job(1, stage="anchor")
    [claim] = platform.claim(1, "anchor")
    platform.ledger.delete(TENANT, job_id)
    assert platform.store.finish([costing(Outcome.done(claim, b"{}", None), 30)]) == set()


def test_at_its_cap_nothing_paid_of_a_job_starts_and_what_runs_ends(platform):
    job_id = capped(platform, 4, 50)
    ids = platform.ids("anchor")
    first, second, running = platform.claim(3, "anchor")
    platform.store.finish([costing(Outcome.retry(first, PROBLEM, 0), 49)])
    assert platform.ids("anchor") == [ids[0], ids[3]]  # 49 < 50
    platform.store.finish([costing(Outcome.retry(second, PROBLEM, 0), 1)])
    free = platform.job(1, stage="anchor")
    assert len(platform.ids("anchor")) == 1
    assert platform.store.claim(ids, "anchor", "worker") == []
    assert [claim.job_id for claim in platform.claim(10, "anchor")] == [free]
    assert platform.store.heartbeat([running]) == {running.id}
    assert platform.store.finish([costing(Outcome.done(running, b"{}", None), 25)])
    assert cost_of(platform, job_id) == 75
    assert platform.statuses(job_id) == ["queued", "queued", "succeeded", "queued"]


def test_a_capped_job_ends_with_what_was_paid_for(platform):
    job_id = capped(platform, 5, 20)
    [paid] = platform.claim(1, "anchor")
    spend(platform, 10)
    platform.store.finish([costing(Outcome.done(paid, b"{}", "surprisal"), 10)])
    platform.sweep.end_items(100)
    assert platform.statuses(job_id) == ["queued", "succeeded", "failed", "failed", "failed"]
    # what it has cost so far is not thrown away: the next stage costs nothing
    [claim] = platform.claim(1, "surprisal")
    platform.store.finish([Outcome.done(claim, b"{}", None)])
    platform.sweep.finish_jobs(100)
    assert platform.phase(job_id) == "done"
    [summary] = platform.ledger.error_summary(TENANT, job_id)
    assert (summary.code, summary.items, summary.first_line) == ("cost-cap-reached", 3, 3)
    assert "cap" in summary.detail
    assert len([r for r in platform.results(job_id) if r.payload is not None]) == 2


def test_an_item_that_would_be_tried_again_ends_at_the_cap(platform):
    job_id = capped(platform, 1, 20)
    [claim] = platform.claim(1, "anchor")
    platform.store.finish([costing(Outcome.retry(claim, PROBLEM, 60), 20)])
    assert platform.sweep.end_items(100) == 1
    [result] = platform.results(job_id)
    assert result.problem.code == "cost-cap-reached"


def test_a_cap_ends_nothing_of_other_jobs_and_nothing_below_it(platform):
    below, none = capped(platform, 2, 21), platform.job(2, stage="anchor")
    other = platform.job(2, stage="surprisal")
    spend(platform, 20)
    spend(platform, 99)  # turns are taken: the other job's
    assert {cost_of(platform, below), cost_of(platform, none)} == {20, 99}
    assert platform.sweep.end_items(100) == 0
    assert platform.statuses(other) == ["queued", "queued"]


def test_only_what_costs_nothing_is_tried_again_at_the_cap(platform):
    job_id = capped(platform, 3, 20)
    moved, failed, last = platform.claim(3, "anchor")
    platform.store.finish([costing(Outcome.done(moved, b"{}", "surprisal"), 10)])
    platform.store.finish([costing(Outcome.fail(failed, PROBLEM), 10)])
    platform.store.finish([Outcome.fail(platform.claim(1, "surprisal")[0], PROBLEM)])
    platform.store.finish([Outcome.fail(last, PROBLEM)])
    platform.sweep.finish_jobs(100)
    assert platform.ledger.retry_failed(TENANT, job_id) == 1
    assert platform.statuses(job_id) == ["queued", "failed", "failed"]
    platform.store.finish([Outcome.done(platform.claim(1, "surprisal")[0], b"{}", None)])
    platform.sweep.finish_jobs(100)
    with pytest.raises(CostCapReached):
        platform.ledger.retry_failed(TENANT, job_id)
    assert platform.ledger.retry_failed("b", job_id) == 0
    assert platform.phase(job_id) == "done"


def test_concurrent_bookings_intakes_and_sweeps_add_up_without_deadlock(platform):
    """Four threads finish mixed batches of the same jobs while others take in and sweep."""
    ids = [capped(platform, 60, 10**9) for _ in range(4)]
    filling = platform.job(1, stage="anchor", ingested=False)

    def work(number):
        cost = 0
        while claims := platform.store.claim_next("anchor", f"w{number}", 7):
            claims = claims[::-1] if number % 2 else claims
            stale = [replace(claim, fence=claim.fence - 1) for claim in claims]
            platform.store.finish(
                [costing(Outcome.done(claim, b"{}", None), 3) for claim in claims]
                + [costing(Outcome.release(claim), 1) for claim in stale]
            )
            cost += 4 * len(claims)
        return cost

    def fill(_):
        for line in range(2, 40):
            new = [NewItem(line * 10 + n, "anchor", b"{}") for n in range(10)]
            platform.intake.add_items(filling, new)
        return 0

    def sweep(_):
        for _ in range(40):
            platform.sweep.end_items(100)
            platform.sweep.finish_jobs(100)
        return 0

    with ThreadPoolExecutor(6) as pool:
        runs = [pool.submit(work, n) for n in range(4)]
        runs += [pool.submit(fill, 0), pool.submit(sweep, 0)]
        paid = sum(run.result() for run in runs)
    assert paid == 4 * 240
    assert sum(cost_of(platform, job_id) for job_id in ids) == paid
    assert sum(sum(item_costs(platform, job_id)) for job_id in ids) == 3 * 240
