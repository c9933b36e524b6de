"""The sweeper's side of the job store, on every database."""

from __future__ import annotations

import threading

from sqlalchemy import select

from asap_runtime.sweep import COUNTED, Backlog, Expired, Load
from asap_runtime.tables import items
from asap_runtime.values import NewItem
from job_store import PROBLEM, TENANT


def test_published_items_are_not_due_until_they_are_forgotten(platform):
    platform.job(4)
    due = platform.sweep.due("one", 3)
    assert len(due) == 3
    platform.sweep.mark_published(due)
    platform.sweep.mark_published([])
    assert len(platform.ids()) == 1
    platform.pass_time(30)
    assert len(platform.ids()) == 1
    platform.pass_time(31)
    assert len(platform.ids()) == 4


def test_an_item_that_moved_on_is_not_marked(platform):
    platform.job()
    seen = platform.sweep.due("one", 1)
    (claim,) = platform.claim()
    platform.sweep.mark_published(seen)
    platform.store.advance(claim, b"{}", "two")
    platform.sweep.mark_published(seen)
    assert platform.ids("two") == [claim.id]
    platform.sweep.mark_published([claim.due()])
    assert platform.ids("two") == []


def test_what_no_message_names_is_withdrawn(platform):
    job_id, due = platform.intake.create_single(TENANT, "prune", {}, 0, NewItem(1, "one", b"{}"))
    assert platform.sweep.due("one", 10) == []
    platform.sweep.withdraw(due)
    assert platform.sweep.due("one", 10) == [due]
    platform.claim()
    platform.sweep.withdraw(due)
    assert platform.phase(job_id) == "running"


def ids_of(platform, job_id):
    statement = select(items.c.id).where(items.c.job_id == job_id).order_by(items.c.position)
    with platform.database.read() as connection:
        return list(connection.execute(statement).scalars())


def test_due_goes_by_priority(platform):
    platform.job(2, priority=5)
    platform.job(1, priority=0)
    assert [due.priority for due in platform.sweep.due("one", 10)] == [0, 5, 5]
    assert platform.sweep.due("two", 10) == []


def test_a_lost_lease_is_queued_again_and_poison_after_three(platform):
    job_id = platform.job(2)
    for _ in range(2):
        platform.claim(lease_s=-1)
        assert platform.sweep.expire_leases(10) == Expired(requeued=2, failed=0)
    (good, _) = platform.claim(lease_s=-1)
    platform.store.advance(good, b"{}", "two")
    assert platform.sweep.expire_leases(10) == Expired(requeued=0, failed=1)
    assert platform.sweep.expire_leases(10) == Expired(requeued=0, failed=0)
    ended = platform.ledger.items(TENANT, job_id, status="failed")
    assert [item.problem.code for item in ended] == ["lease-lost"]
    for _ in range(2):  # the next stage starts with a clean count
        platform.claim(stage="two", lease_s=-1)
        assert platform.sweep.expire_leases(10) == Expired(requeued=1, failed=0)


def test_lost_leases_are_counted_by_stage(platform):
    platform.job(2)
    platform.job(1, stage="two")
    platform.claim(lease_s=-1)
    platform.claim(stage="two", lease_s=-1)
    assert platform.sweep.expire_leases(10).stages == {"one": 2, "two": 1}
    assert platform.sweep.expire_leases(10).stages == {}


def test_every_pass_is_bounded(platform):
    platform.job(5)
    platform.claim(lease_s=-1)
    assert platform.sweep.expire_leases(2) == Expired(requeued=2, failed=0)
    for _ in range(3):
        platform.sweep.finish_jobs(1)
    jobs = [platform.job(0) for _ in range(3)]
    assert [platform.sweep.finish_jobs(2) for _ in range(3)] == [2, 1, 0]
    assert {platform.phase(job) for job in jobs} == {"done"}


def test_a_big_cancelled_job_is_ended_pass_by_pass(platform):
    job_id = platform.job(600)
    platform.claim(10)
    platform.ledger.cancel(TENANT, job_id)
    assert platform.phase(job_id) == "cancelled"
    assert platform.statuses(job_id)[:10] == ["cancelled"] * 10
    assert [platform.sweep.end_items(60) for _ in range(3)] == [60, 40, 0]
    assert set(platform.statuses(job_id)) == {"cancelled"}
    assert platform.sweep.finish_jobs(10) == 1


def test_items_past_the_deadline_fail(platform):
    job_id = platform.job(3, expires_in_s=100)
    first, second = platform.claim(2)
    platform.store.advance(first, b"{}", None)
    platform.pass_time(101)
    assert platform.claim() == platform.ids() == []
    assert not platform.store.advance(second, b"{}", None)
    assert platform.sweep.end_items(10) == 2
    platform.sweep.finish_jobs(10)
    assert platform.phase(job_id) == "expired"
    assert platform.statuses(job_id) == ["succeeded", "failed", "failed"]
    assert platform.results(job_id)[2].problem.code == "deadline-exceeded"


def test_a_job_done_just_before_its_deadline_is_done(platform):
    job_id = platform.job(1, expires_in_s=100)
    (claim,) = platform.claim()
    platform.store.advance(claim, b"{}", None)
    platform.pass_time(101)
    assert platform.sweep.end_items(10) == 0
    assert platform.sweep.finish_jobs(10) == 1
    assert platform.phase(job_id) == "done"


def test_a_job_finishes_once_when_all_items_are_final(platform):
    job_id = platform.job(2)
    first, second = platform.claim()
    platform.store.advance(first, b"{}", None)
    assert platform.sweep.finish_jobs(10) == 0
    platform.store.fail(second, PROBLEM)
    assert platform.phase(job_id) == "finalizing"
    assert platform.sweep.finish_jobs(10) == 1
    finished_at = platform.ledger.job(TENANT, job_id).facts.finished_at
    assert platform.sweep.finish_jobs(10) == 0
    assert platform.ledger.job(TENANT, job_id).facts.finished_at == finished_at


def test_tenants_take_turns_whatever_stands_before_them(platform):
    platform.job(10_000, tenant="big")
    small = platform.job(10, tenant="small")
    order = [due.id for due in platform.sweep.due("one", 40)]
    of_small = ids_of(platform, small)
    assert len(order) == len(set(order)) == 40
    assert set(of_small) <= set(order[:20])
    assert order[0] in of_small or order[1] in of_small


def test_jobs_of_one_tenant_take_turns(platform):
    jobs = [platform.job(100) for _ in range(3)]
    order = {due.id for due in platform.sweep.due("one", 6)}
    assert order == {id for job in jobs for id in ids_of(platform, job)[:2]}


def test_live_comes_before_the_batch_of_all_tenants(platform):
    platform.job(20, tenant="big", priority=5)
    platform.job(3, tenant="small", priority=9)
    platform.job(2, tenant="other", priority=0)
    platform.job(2, tenant="big", priority=0)
    priorities = [due.priority for due in platform.sweep.due("one", 100)]
    assert priorities == [0] * 4 + [5] * 20 + [9] * 3


def test_the_load_is_what_is_published_or_running(platform):
    platform.job(6)
    platform.job(1, stage="two")
    claims = platform.claim(2)
    platform.sweep.mark_published(platform.sweep.due("one", 3))
    assert platform.sweep.load("one") == Load(published=3, running=2)
    platform.store.advance(claims[0], b"{}", "two")
    platform.claim(1)
    assert platform.sweep.load("one") == Load(published=2, running=2)
    assert platform.sweep.load("two") == Load(published=0, running=0)


def test_the_backlog_counts_due_and_running(platform):
    platform.job(5)
    claims = platform.claim(2)
    platform.store.wait(claims[0], b"{}", 60)
    backlog = platform.sweep.backlog("one")
    assert (backlog.due, backlog.running) == (3, 1)
    assert 0 <= backlog.oldest_due_s < 30
    assert platform.sweep.backlog("two") == Backlog(due=0, running=0, oldest_due_s=0.0)


def test_the_backlog_knows_how_long_the_oldest_item_is_due(platform):
    platform.job(1)
    platform.pass_time(100)
    platform.job(1)
    (claim, _) = platform.claim(2)
    platform.store.retry(claim, PROBLEM, 0)
    platform.pass_time(10)
    assert 10 <= platform.sweep.backlog("one").oldest_due_s < 100  # since its retry was due
    platform.job(1)
    platform.store.release(platform.claim(0))
    platform.pass_time(1000)
    assert platform.sweep.backlog("one").oldest_due_s >= 1000


def test_a_huge_backlog_is_not_counted_to_its_end(platform):
    platform.job(COUNTED + 100)
    assert platform.sweep.backlog("one").due == COUNTED


def test_jobs_past_their_retention_are_named(platform):
    job_id = platform.job(0, tenant="b")
    platform.job(1)
    platform.sweep.finish_jobs(10)
    assert platform.sweep.finished_before(3600, 10) == []
    platform.pass_time(3601)
    assert platform.sweep.finished_before(3600, 10) == [("b", job_id)]


def test_one_sweeper_is_active(platform):
    seen = []

    def other() -> None:
        with platform.sweep.active() as mine:
            seen.append(mine)

    with platform.sweep.active() as mine:
        assert mine
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    other()
    assert seen == [False, True]
