"""How jobs come in, on every database."""

from __future__ import annotations

import pytest

from asap.errors import InvalidInput
from asap_runtime.intake import (
    StoredLines,
    StoredScores,
    in_batches,
    source_from_json,
    source_to_json,
)
from asap_runtime.values import ItemProblem, NewItem
from job_store import TENANT


def test_items_keep_input_order_over_batches(platform):
    job_id = platform.job(1234)
    items = platform.ledger.items(TENANT, job_id, limit=2000)
    assert [(item.position, item.line) for item in items] == [(n, n + 1) for n in range(1234)]


def test_a_bad_line_is_a_failed_item_and_an_empty_route_a_succeeded_one(platform):
    job_id = platform.job(0, ingested=False)
    problem = ItemProblem("control-token-in-text", "line 1: a control token", {"line": 1})
    added = platform.intake.add_items(
        job_id, [NewItem(1, "one", None, problem=problem), NewItem(2, None, b'{"as": "it is"}')]
    )
    platform.intake.mark_ingested(job_id)
    assert added == 2
    bad, through = platform.results(job_id)
    assert (bad.status, bad.problem) == ("failed", problem)
    assert (through.status, through.payload) == ("succeeded", b'{"as": "it is"}')
    platform.sweep.finish_jobs(1)
    assert platform.phase(job_id) == "done"


def test_a_custom_id_is_unique_in_its_job(platform):
    jobs = [platform.job(0, ingested=False) for _ in range(2)]
    for job_id in jobs:
        platform.intake.add_items(job_id, [NewItem(1, "one", b"{}", custom_id="x")])
        lines = [NewItem(2, "one", b"{}", custom_id="y"), NewItem(3, "one", b"{}", custom_id="y")]
        platform.intake.add_items(job_id, [*lines, NewItem(4, "one", b"{}", custom_id="x")])
        items = platform.ledger.items(TENANT, job_id)
        assert [item.status for item in items] == ["queued", "queued", "failed", "failed"]
        assert [item.custom_id for item in items] == ["x", "y", None, None]
        assert items[2].problem.context["custom_id"] == "y"


def test_a_stopped_or_whole_job_takes_no_items(platform):
    whole, cancelled, rejected = (platform.job(1, ingested=False) for _ in range(3))
    platform.intake.mark_ingested(whole)
    platform.ledger.cancel(TENANT, cancelled)
    platform.intake.reject(rejected, [])
    for job_id in (whole, cancelled, rejected, "0" * 32):
        with pytest.raises(InvalidInput) as caught:
            platform.intake.add_items(job_id, [NewItem(2, "one", b"{}")])
        assert caught.value.problem_code == "job-finished"
        assert not platform.intake.mark_ingested(job_id)
        assert not platform.intake.reject(job_id, [])


def test_a_rejected_job_keeps_its_first_problems_and_costs_nothing(platform):
    job_id = platform.job(3, ingested=False)
    problems = [ItemProblem("malformed-json", f"line {n}", {"line": n}) for n in range(150)]
    assert platform.intake.reject(job_id, problems)
    view = platform.ledger.job(TENANT, job_id)
    assert view.phase == "rejected"
    assert view.problems == tuple(problems[:100])
    assert platform.claim() == []
    assert platform.sweep.end_items(10) == 3
    assert platform.sweep.finish_jobs(10) == 1
    assert platform.statuses(job_id) == ["cancelled"] * 3


def test_a_broken_input_leaves_whole_batches_only(platform):
    def lines():
        yield from (NewItem(line, "one", b"{}") for line in range(1, 701))
        raise OSError("the upload ended half-way")

    job_id = platform.job(0, ingested=False)
    with pytest.raises(OSError, match="half-way"):
        platform.intake.add_items(job_id, lines())
    assert len(platform.statuses(job_id)) == 500
    assert platform.ledger.delete(TENANT, job_id)


def test_a_key_is_tied_to_its_job(platform):
    platform.keys.remember(TENANT, "key", "hash")
    job_id = platform.job(1, idempotency_key="key")
    assert platform.keys.remember(TENANT, "key", "hash").job_id == job_id


def test_what_was_said_of_a_job_is_kept(platform):
    job_id = platform.job(1, webhook="https://example.org/done", cost_cap=2, expires_in_s=60.0)
    view = platform.ledger.job(TENANT, job_id)
    assert (view.webhook, view.cost_cap) == ("https://example.org/done", 2)
    assert view.facts.expires_at - view.facts.created_at == 60_000_000


@pytest.mark.parametrize("stored", [StoredLines("a/x", ".gz", "triple", True), StoredScores("j")])
def test_a_source_is_stored_as_it_is(stored):
    assert source_from_json(source_to_json(stored)) == stored


def test_batches_end_by_number_and_by_size():
    small = [NewItem(n, "one", b"{}") for n in range(1001)]
    assert [len(batch) for batch in in_batches(small)] == [500, 500, 1]
    large = [NewItem(n, "one", bytes(3 * 2**20)) for n in range(7)]
    assert [len(batch) for batch in in_batches(large)] == [3, 3, 1]
    assert list(in_batches([])) == []
