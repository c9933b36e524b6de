from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from asap.errors import InvalidInput
from asap.metrics import Result
from asap.report import Report, build_report
from asap.report_markdown import render_markdown

SOLVED = {
    "Original": {"humaneval": 60, "own": 10},
    "SPIRIT": {"humaneval": 70, "own": 12},
    "ASAP": {"humaneval": 90, "own": 13},
}
TOKENS = {"Original": 400, "SPIRIT": 300, "ASAP": 100}


def results(model, budgets=(1024, 2048), samples=1):
    generator = random.Random(model)
    return [
        Result(
            benchmark=benchmark,
            task_id=f"{benchmark}/{task}",
            budget=budget,
            number=number,
            extraction=extraction,
            verdict="passed" if task < solved * budget // 2048 else "wrong",
            tokens=TOKENS[model] + generator.randrange(50),
            truncated=task % 7 == 0,
            loop=False,
            flags=(),
            started_at=float(task),
            seconds=2.0,
        )
        for benchmark, solved in SOLVED[model].items()
        for budget in budgets
        for extraction in ("strict", "lenient")
        for task in range(164 if benchmark == "humaneval" else 20)
        for number in range(samples)
    ]


def report(**options):
    given = {model: results(model) for model in SOLVED}
    return build_report(given, **{"candidate": "ASAP", **options})


def test_rows_are_for_each_model_benchmark_budget_and_extraction():
    made = report()
    assert made.models == ("Original", "SPIRIT", "ASAP")
    assert len(made.rows) == 3 * 2 * 2 * 2
    assert not made.incomplete
    curve = made.curve("ASAP", "humaneval", "strict")
    assert [(row.budget, row.passed) for row in curve] == [(1024, 45), (2048, 90)]


def test_the_candidate_is_compared_on_the_same_tasks():
    made = report()
    found = {
        c.baseline: c
        for c in made.comparisons
        if (c.benchmark, c.budget, c.extraction) == ("humaneval", 2048, "strict")
    }
    original, spirit = found["Original"], found["SPIRIT"]
    assert (original.both, original.only_candidate, original.only_baseline) == (60, 30, 0)
    assert original.mcnemar_p == pytest.approx(2 / 2**30)
    assert original.mcnemar_p_holm == pytest.approx(4 / 2**30)
    assert spirit.mcnemar_p_holm == spirit.mcnemar_p == pytest.approx(2 / 2**20)
    assert original.accuracy.mean == pytest.approx(100 * 30 / 164)
    assert original.tokens.low < original.tokens.mean < original.tokens.high < -250
    assert original.tokens_p_holm == pytest.approx(2 * original.tokens_wilcox.p_two_sided)
    assert 0.2 < original.kept_ratio < 0.35
    own = [d for d in made.differences if (d.benchmark, d.budget) == ("own", 2048)]
    assert {d.task_id for d in own if d.baseline == "Original"} == {"own/10", "own/11", "own/12"}


def test_benchmarks_are_pairs_at_their_largest_budget():
    across = [a for a in report().across if a.extraction == "strict"]
    assert [(a.baseline, a.benchmarks) for a in across] == [
        ("Original", ("humaneval", "own")),
        ("SPIRIT", ("humaneval", "own")),
    ]
    assert {a.test.p_greater for a in across} == {0.25}


def test_order_and_repetition_change_no_byte():
    made = report()
    shuffled = {model: results(model) + results(model)[:40] for model in reversed(SOLVED)}
    for found in shuffled.values():
        random.Random(5).shuffle(found)
    again = build_report(shuffled, candidate="ASAP")
    assert again.to_json() == made.to_json()
    assert render_markdown(again) == render_markdown(made)
    assert Report.model_validate(json.loads(made.to_json())) == made


def test_two_results_of_one_completion_are_refused():
    found = results("ASAP")
    with pytest.raises(InvalidInput, match="two different results"):
        build_report({"ASAP": [*found, replace(found[0], tokens=1)]})
    with pytest.raises(InvalidInput, match="no results of 'B'"):
        build_report({"ASAP": found}, candidate="B")


def test_what_is_missing_is_said():
    found = results("ASAP", budgets=(2048,))
    found[0] = replace(found[0], verdict="sandbox-trouble")
    found = [r for r in found if r.task_id != "humaneval/5"]
    made = build_report({"ASAP": found}, expected={"own": 21, "gone": 3})
    assert made.incomplete == (
        "gone: no task is done",
        "ASAP, humaneval at 2048 tokens, strict: 162 of 164 tasks are scored",
        "ASAP, humaneval at 2048 tokens, strict: 1 of 163 completions have no verdict",
        "ASAP, humaneval at 2048 tokens, lenient: 163 of 164 tasks are scored",
        "ASAP, own at 2048 tokens, strict: 20 of 21 tasks are scored",
        "ASAP, own at 2048 tokens, lenient: 20 of 21 tasks are scored",
    )
    assert "162 of 164" in render_markdown(made)


def test_tasks_that_one_side_lacks_are_left_out_of_the_comparison():
    mine, theirs = results("ASAP"), results("Original")
    mine = [replace(r, verdict=None) if r.task_id == "own/0" else r for r in mine]
    theirs = [r for r in theirs if r.task_id != "own/1"]
    made = build_report({"ASAP": mine, "Original": theirs}, candidate="ASAP")
    assert {c.tasks for c in made.comparisons if c.benchmark == "own"} == {18}
    assert {c.tasks for c in made.comparisons if c.benchmark == "humaneval"} == {164}


def test_one_model_needs_no_comparison():
    made = build_report({"ASAP": results("ASAP", samples=2)}, provenance={"engine": "x|```y"})
    assert (made.comparisons, made.across, made.differences) == ((), (), ())
    text = render_markdown(made)
    assert "````json" in text
    assert "84.15" in text  # the paper's own table beside ours


def test_latency_is_shared_with_what_ran_beside_it():
    """Every completion of both budgets and benchmarks ran at one of 165 moments."""
    rows = build_report({"ASAP": results("ASAP")}).rows
    strict = [row for row in rows if row.extraction == "strict"]
    assert sum(row.latency_batch_s * row.samples for row in strict) == pytest.approx(165)


def test_the_tables_have_first_and_further_tokens():
    streamed = [replace(r, ttft_s=0.5, tokens=16) for r in results("ASAP")]
    text = render_markdown(build_report({"ASAP": streamed}))
    assert "| first token p50 s | first token p95 s | per token p50 ms | per token p95 ms |" in text
    assert "| 0.50 | 0.50 | 100.00 | 100.00 |" in text
