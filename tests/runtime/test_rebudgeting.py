"""Another budget for an ended job: equal to a full run, by a tenant's own job, without a model."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from asap.config import PruneConfig
from asap.errors import Conflict, InvalidInput, NotFound
from asap.fine import fine_prune
from asap.types import CoarseBlock, Record, Triple
from asap_runtime.database import Database, open_engine
from asap_runtime.migrate import upgrade
from asap_runtime.rebudgeting import ended_job, rebudgeted_items, rebudgeted_values
from asap_runtime.values import ItemProblem, NewItem
from fakes import TableScorer
from job_store import TENANT, Platform

EXAMPLES = Path(__file__).parents[2] / "examples" / "triples.jsonl"


def scorer():
    return TableScorer(lambda steps: [float(len(step) % 7) for step in steps])


@pytest.fixture
def platform(tmp_path):
    url = f"sqlite:///{tmp_path}/asap.db"
    upgrade(url)
    database = Database(open_engine(url))
    yield Platform(database)
    database.close()


def triples(count):
    lines = EXAMPLES.read_text().splitlines()[:count]
    return [Triple(**{k: row[k] for k in ("question", "cot", "answer")})
            for row in map(json.loads, lines)]  # fmt: skip


async def full_run(some, config):
    """Every record with half of its steps from stage 1, through stage 2."""
    records = []
    for triple in some:
        record = Record(triple=triple, config=config)
        kept = tuple(range(0, len(record.source_steps), 2))
        block = CoarseBlock(protocol="select", model="m", kept=kept, status="accepted")
        records.append(record.with_coarse(block))
    return await fine_prune(records, scorer())


def ended(platform, records, *more, config=None, finished=True):
    """A job that ended with these records, and with more items after them."""
    config = records[0].config if config is None else config
    job_id = platform.intake.create_job(TENANT, "prune", config.model_dump(mode="json"), 5)
    items = [
        NewItem(line, None, record.model_dump_json().encode(), custom_id=f"c{line}")
        for line, record in enumerate(records, 1)
    ]
    platform.intake.add_items(job_id, [*items, *more])
    platform.intake.mark_ingested(job_id)
    if finished:
        platform.sweep.finish_jobs(10)
    return job_id


def rebudgeted(platform, job_id, **given):
    view = ended_job(platform.ledger, TENANT, job_id)
    config = PruneConfig(**rebudgeted_values(view, given))
    return list(rebudgeted_items(platform.ledger, TENANT, job_id, config))


@pytest.mark.parametrize(
    "given",
    [
        {"max_tokens": 40},
        {"max_tokens": 100_000},
        {"keep_ratio": 0.2},
        {"step_ratio": 0.5, "min_steps": 3},
        {"max_tokens": 60, "refill": True, "protect_first": 1, "protect_last": 2},
    ],
)
async def test_it_equals_a_full_run_at_that_budget(platform, given):
    first = await full_run(triples(12), PruneConfig(max_tokens=200))
    job_id = ended(platform, first)
    full = await full_run(triples(12), PruneConfig(**given))
    items = rebudgeted(platform, job_id, **given)
    assert [item.payload for item in items] == [r.model_dump_json().encode() for r in full]
    assert {(item.stage, item.problem) for item in items} == {(None, None)}
    assert [(item.line, item.custom_id) for item in items] == [(n, f"c{n}") for n in range(1, 13)]


async def test_a_stored_score_of_another_name_can_rank(platform):
    job_id = ended(platform, await full_run(triples(4), PruneConfig(max_tokens=200)))
    given = {"score": "first_token_entropy", "max_tokens": 50}
    full = await full_run(triples(4), PruneConfig(**given))
    again = [Record.model_validate_json(i.payload) for i in rebudgeted(platform, job_id, **given)]
    assert again == full


async def test_the_items_make_a_job_that_ends_at_once(platform):
    records = await full_run(triples(3), PruneConfig())
    job_id = ended(platform, records)
    config = PruneConfig(max_tokens=30)
    items = rebudgeted_items(platform.ledger, TENANT, job_id, config)
    new = platform.intake.create_job(TENANT, "prune", config.model_dump(mode="json"), 5)
    assert platform.intake.add_items(new, items) == 3
    platform.intake.mark_ingested(new)
    platform.sweep.finish_jobs(10)
    assert platform.phase(new) == "done"
    shorter = [Record.model_validate_json(r.payload) for r in platform.results(new)]
    assert all(a.tokens.pruned < b.tokens.pruned for a, b in zip(shorter, records, strict=True))
    # and its scores can be used again in turn
    assert len(rebudgeted(platform, new, max_tokens=20)) == 3


async def test_lines_without_scores_say_so(platform):
    records = await full_run(triples(3), PruneConfig(max_tokens=200))
    unscored = records[2].model_copy(
        update={"fine": records[2].fine.model_copy(
            update={"scored": records[2].fine.scored.model_copy(update={"scores": {}})}
        )}
    )  # fmt: skip
    bad = NewItem(4, None, None, problem=ItemProblem("invalid-input", "no answer"))
    job_id = ended(platform, [*records[:2], unscored], bad)
    items = rebudgeted(platform, job_id, max_tokens=20)
    assert [item.problem is None for item in items] == [True, True, False, False]
    assert "scores" in items[2].problem.detail
    assert items[2].custom_id == "c3"
    assert items[3].problem.detail == (
        f"line 4 has no scores to use again: in job {job_id} it ended as failed (invalid-input)"
    )
    assert all(item.payload is None for item in items[2:])


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"max_tokens": 9, "method": "random"}, ["/config/method"]),
        ({"tau": 0.5, "seed": 1, "keep_ratio": 0.5}, ["/config/tau", "/config/seed"]),
        ({"score_within_budget": False}, ["/config/score_within_budget"]),
    ],
)
async def test_what_was_decided_before_selection_cannot_change(platform, given, named):
    view = ended_job(
        platform.ledger, TENANT, ended(platform, await full_run(triples(1), PruneConfig()))
    )
    with pytest.raises(InvalidInput) as refused:
        rebudgeted_values(view, given)
    assert [error["pointer"] for error in refused.value.context["errors"]] == named
    assert named[0] in refused.value.detail


async def test_equal_values_are_no_change_and_the_old_target_goes(platform):
    old = PruneConfig(max_tokens=200, tau=0.7)
    view = ended_job(platform.ledger, TENANT, ended(platform, await full_run(triples(1), old)))
    values = rebudgeted_values(view, {"tau": 0.7, "method": "asap", "keep_ratio": 0.5})
    assert PruneConfig(**values) == PruneConfig(tau=0.7, keep_ratio=0.5)
    assert PruneConfig(**rebudgeted_values(view, {})) == old


async def test_rounds_allow_another_target_only(platform):
    config = PruneConfig(max_tokens=100, mode="iterative")
    job_id = ended(platform, await full_run(triples(3), config))
    full = await full_run(triples(3), PruneConfig(max_tokens=150, mode="iterative"))
    items = rebudgeted(platform, job_id, max_tokens=150)
    records = [Record.model_validate_json(item.payload) for item in items]
    assert [r.pruned_cot for r in records] == [r.pruned_cot for r in full]
    assert any(r.status == "compressed" for r in records)
    with pytest.raises(InvalidInput, match="/config/min_steps"):
        rebudgeted(platform, job_id, min_steps=4)
    assert {i.problem.code for i in rebudgeted(platform, job_id, max_tokens=5)} == {"invalid-input"}


async def test_only_ended_jobs_of_the_tenant_are_used(platform):
    running = ended(platform, await full_run(triples(1), PruneConfig()), finished=False)
    for job_id in (running, platform.job(1)):
        with pytest.raises(Conflict) as refused:
            rebudgeted(platform, job_id)
        assert refused.value.problem_code == "results-not-ready"
    platform.sweep.finish_jobs(10)
    assert len(rebudgeted(platform, running)) == 1
    for tenant, job_id in (("b", running), (TENANT, "0" * 32)):
        with pytest.raises(NotFound):
            list(rebudgeted_items(platform.ledger, tenant, job_id, PruneConfig()))
    training = platform.intake.create_job(TENANT, "train", {}, 5)
    with pytest.raises(InvalidInput, match="train"):
        ended_job(platform.ledger, TENANT, training)


async def test_a_cancelled_job_gives_what_it_has(platform):
    [record] = await full_run(triples(1), PruneConfig())
    job_id = ended(platform, [record], NewItem(2, "anchor", b"{}"))
    platform.ledger.cancel(TENANT, job_id)
    platform.sweep.finish_jobs(10)
    assert platform.phase(job_id) == "cancelled"
    first, second = rebudgeted(platform, job_id)
    assert first.payload is not None
    assert "cancelled" in second.problem.detail


async def test_a_job_that_changes_under_the_reader_is_no_shorter_result(platform):
    job_id = ended(platform, await full_run(triples(10), PruneConfig()) * 20)
    reader = rebudgeted_items(platform.ledger, TENANT, job_id, PruneConfig())
    next(reader)
    platform.ledger.delete(TENANT, job_id)
    with pytest.raises(NotFound):
        list(reader)


async def test_an_interrupted_reader_goes_on_where_it_was(platform):
    job_id = ended(platform, await full_run(triples(6), PruneConfig()))
    config = PruneConfig(max_tokens=30)
    whole = list(rebudgeted_items(platform.ledger, TENANT, job_id, config))
    for start in (0, 1, 4, 6):
        rest = list(rebudgeted_items(platform.ledger, TENANT, job_id, config, start=start))
        assert rest == whole[start:]


async def test_memory_does_not_grow_with_the_job(platform):
    [record] = await full_run(triples(1), PruneConfig())
    job_id = ended(platform, [record] * 1280)
    items = rebudgeted_items(platform.ledger, TENANT, job_id, PruneConfig(max_tokens=20))
    tracemalloc.start()
    assert sum(1 for _ in items) == 1280
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 256 * len(record.model_dump_json())
