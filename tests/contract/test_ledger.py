"""The tenant's side of the job store, on every database."""

from __future__ import annotations

import pytest

from asap.errors import InvalidInput
from asap_runtime.phases import StageCount
from asap_runtime.values import ItemProblem, NewItem
from job_store import PROBLEM, TENANT


def test_a_job_shows_config_facts_and_counts(platform):
    job_id = platform.job(3)
    (claim,) = platform.claim(1)
    platform.store.advance(claim, b"{}", "two")
    view = platform.ledger.job(TENANT, job_id)
    assert (view.id, view.kind, view.config, view.priority) == (
        job_id, "prune", {"method": "asap"}, 5,
    )  # fmt: skip
    assert view.counts == (StageCount("one", "queued", 2), StageCount("two", "queued", 1))
    assert view.facts.created_at <= view.facts.ingested_at <= view.facts.now
    assert view.problems == ()


def test_the_phase_follows_the_items(platform):
    job_id = platform.job(1, ingested=False)
    assert platform.phase(job_id) == "validating"
    platform.intake.mark_ingested(job_id)
    assert platform.phase(job_id) == "queued"
    (claim,) = platform.claim()
    assert platform.phase(job_id) == "running"
    platform.store.advance(claim, b"{}", None)
    assert platform.phase(job_id) == "finalizing"
    platform.sweep.finish_jobs(1)
    assert platform.phase(job_id) == "done"


def test_a_second_tenant_sees_and_changes_nothing(platform):
    job_id = platform.job(2)
    platform.store.fail(platform.claim(1)[0], PROBLEM)
    ledger = platform.ledger
    assert ledger.job("b", job_id) is None
    assert ledger.jobs("b") == []
    assert ledger.items("b", job_id) == []
    assert list(ledger.results("b", job_id)) == []
    assert ledger.error_summary("b", job_id) == []
    assert ledger.past_problems("b", job_id, 0) == []
    assert ledger.open_items("b") == 0
    assert ledger.open_items(TENANT) == ledger.open_items() == 1
    assert not ledger.cancel("b", job_id)
    assert ledger.retry_failed("b", job_id) == 0
    assert not ledger.delete("b", job_id)
    assert platform.statuses(job_id) == ["failed", "queued"]
    assert platform.phase(job_id) == "running"


def test_jobs_are_listed_newest_first_by_cursor(platform):
    made = [platform.job(0) for _ in range(5)]
    platform.job(0, tenant="b")
    first = platform.ledger.jobs(TENANT, limit=3)
    platform.job(0)  # what comes later does not move the pages
    second = platform.ledger.jobs(TENANT, cursor=first[-1].cursor, limit=3)
    assert len(first) == 3
    assert {view.id for view in first + second} == set(made)
    created = [view.facts.created_at for view in first + second]
    assert created == sorted(created, reverse=True)
    assert platform.ledger.jobs(TENANT, cursor=second[-1].cursor) == []


def test_a_foreign_cursor_is_refused(platform):
    with pytest.raises(InvalidInput, match="cursor"):
        platform.ledger.jobs(TENANT, cursor="'; DROP TABLE jobs")


def test_items_are_listed_by_cursor_and_status(platform):
    job_id = platform.job(5)
    platform.store.fail(platform.claim(1)[0], PROBLEM)
    first = platform.ledger.items(TENANT, job_id, limit=2)
    rest = platform.ledger.items(TENANT, job_id, cursor=first[-1].position)
    assert [item.position for item in first + rest] == [0, 1, 2, 3, 4]
    assert [item.line for item in first] == [1, 2]
    failed = platform.ledger.items(TENANT, job_id, status="failed")
    assert [(item.position, item.problem) for item in failed] == [(0, PROBLEM)]


def test_results_come_in_input_order_also_while_the_job_runs(platform):
    job_id = platform.job(200)
    claims = platform.claim() + platform.claim() + platform.claim()
    for claim in claims[::-2]:
        platform.store.advance(claim, b"%d" % claim.position, None)
    positions = [result.position for result in platform.results(job_id)]
    assert positions == list(range(1, 192, 2))
    assert all(int(result.payload) == result.position for result in platform.results(job_id))
    rest = platform.ledger.results(TENANT, job_id, cursor=150)
    assert next(rest).position == 151


def test_the_error_summary_names_the_most_frequent_codes(platform):
    job_id = platform.job(6)
    for claim, code in zip(platform.claim(), "abcdeb", strict=True):
        platform.store.fail(claim, ItemProblem(code * 3, "text"))
    summary = platform.ledger.error_summary(TENANT, job_id)
    assert (summary[0].code, summary[0].items, summary[0].first_line) == ("bbb", 2, 2)
    assert [row.code for row in summary[1:]] == ["aaa", "ccc", "ddd", "eee"]


def test_cancel_is_idempotent_and_keeps_partial_results(platform):
    job_id = platform.job(3)
    (claim,) = platform.claim(1)
    platform.store.advance(claim, b"{}", None)
    assert platform.ledger.cancel(TENANT, job_id)
    cancelled_at = platform.ledger.job(TENANT, job_id).facts.cancelled_at
    assert platform.ledger.cancel(TENANT, job_id)
    assert platform.ledger.job(TENANT, job_id).facts.cancelled_at == cancelled_at
    assert platform.statuses(job_id) == ["succeeded", "cancelled", "cancelled"]
    assert platform.phase(job_id) == "cancelled"
    assert platform.results(job_id)[1].problem.code == "cancelled"


def test_cancel_leaves_a_finished_job_alone(platform):
    job_id = platform.job(0)
    platform.sweep.finish_jobs(1)
    assert platform.ledger.cancel(TENANT, job_id)
    assert platform.phase(job_id) == "done"
    assert not platform.ledger.cancel(TENANT, "0" * 32)


def test_failed_items_get_a_new_series_and_keep_their_history(platform):
    job_id = platform.job(2, expires_in_s=100)
    bad_line = NewItem(9, None, None, problem=ItemProblem("malformed-json", "line 9"))
    other = platform.job(0, ingested=False)
    platform.intake.add_items(other, [bad_line])
    platform.intake.mark_ingested(other)
    good, bad = platform.claim()
    platform.store.advance(good, b"{}", None)
    platform.store.fail(bad, PROBLEM)
    assert platform.ledger.retry_failed(TENANT, job_id) == 0  # not finished yet
    platform.sweep.finish_jobs(10)
    platform.pass_time(200)
    assert platform.ledger.retry_failed(TENANT, other) == 0  # no stage to return to
    assert platform.ledger.retry_failed(TENANT, job_id) == 1
    assert platform.phase(job_id) == "running"
    (again,) = platform.claim()
    assert (again.id, again.attempt, again.fence) == (bad.id, 0, bad.fence + 1)
    assert platform.ledger.past_problems(TENANT, job_id, bad.position) == [PROBLEM]
    platform.store.advance(again, b"{}", None)
    platform.sweep.finish_jobs(10)
    assert platform.phase(job_id) == "done"
    assert platform.statuses(job_id) == ["succeeded", "succeeded"]


def test_delete_removes_all_rows_and_ends_the_work(platform):
    job_id, other = platform.job(3), platform.job(1)
    claims = platform.claim(2)
    assert platform.ledger.delete(TENANT, job_id)
    assert platform.ledger.job(TENANT, job_id) is None
    assert platform.results(job_id) == []
    stale = [claim for claim in claims if claim.job_id == job_id]
    assert platform.store.release(stale) == set()
    assert not platform.ledger.delete(TENANT, job_id)
    new = platform.job(1)  # never an id that a stale message may still name
    assert min(platform.ids()) > max(claim.id for claim in stale)
    assert platform.ledger.job(TENANT, other) is not None
    assert platform.ledger.job(TENANT, new) is not None


def test_a_job_is_there_for_its_tenant_alone(platform):
    job_id = platform.job(1)
    assert platform.ledger.kind(TENANT, job_id) == "prune"
    assert platform.ledger.kind("another", job_id) is None
    assert platform.ledger.kind(TENANT, "0" * 32) is None


def test_the_first_payload_is_read_while_its_item_is_open(platform):
    job_id = platform.job(2)
    assert platform.ledger.first_payload(TENANT, job_id) == b'{"n":1}'
    [first, _] = platform.claim()
    assert platform.store.wait(first, b'{"n":1,"half":true}', 60)
    assert platform.ledger.first_payload(TENANT, job_id) == b'{"n":1,"half":true}'
    assert platform.ledger.first_payload("another", job_id) is None
    assert platform.ledger.first_payload(TENANT, platform.job(0)) is None
