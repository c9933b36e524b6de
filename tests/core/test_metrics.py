from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asap.eval_config import EvalConfig
from asap.eval_items import EvalItem, GradedSample
from asap.grades import Grade
from asap.metrics import (
    Result,
    generation_seconds,
    kept_ratio,
    measure,
    pass_at_k,
    percentile,
    results_of,
    shared_seconds,
)
from asap.problems import Problem, Sample

BASE = Result(
    benchmark="humaneval",
    task_id="HumanEval/0",
    budget=6144,
    number=0,
    extraction="strict",
    verdict="passed",
    tokens=100,
    truncated=False,
    loop=False,
    flags=(),
    started_at=0.0,
    seconds=2.0,
)


def results(*verdicts, **fields):
    return [
        replace(BASE, task_id=f"HumanEval/{n}", verdict=verdict, **fields)
        for n, verdict in enumerate(verdicts)
    ]


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_is_the_share_of_all_choices(n):
    for passed, k in itertools.product(range(n + 1), range(1, n + 1)):
        choices = list(itertools.combinations([True] * passed + [False] * (n - passed), k))
        share = sum(map(any, choices)) / len(choices)
        assert pass_at_k(n, passed, k) == pytest.approx(share)


def test_the_cell_is_the_papers():
    solved = results(*["passed"] * 138, *["wrong"] * 26, tokens=2464)
    row = measure("ASAP", solved)
    assert row.accuracy == pytest.approx(84.146, abs=1e-3)
    assert row.cell == "84.15/2464/0.01"  # all 164 at once in 2 s
    assert (row.tasks, row.passed, row.pass_at) == (164, 138, {1: pytest.approx(84.146, abs=1e-3)})


def test_trouble_of_the_sandbox_is_no_wrong_answer():
    row = measure("m", results("passed", "wrong", "sandbox-trouble", None))
    assert (row.accuracy, row.tasks, row.samples, row.unscored) == (50, 2, 4, 2)
    nothing = measure("m", results("sandbox-trouble"))
    assert (nothing.accuracy, nothing.interval, nothing.tasks) == (0, None, 0)


def test_shares_are_of_all_completions():
    mixed = results("passed", "no-code", "timeout", "timeout")
    mixed[1] = replace(mixed[1], truncated=True, loop=True)
    mixed[2] = replace(mixed[2], flags=("uses:gc", "repeated", "flipped"))
    row = measure("m", mixed)
    assert (row.truncated, row.no_code, row.timeouts, row.loops) == (0.25, 0.25, 0.5, 0.25)
    assert (row.flagged, row.flipped) == (1, 1)


def test_several_completions_of_a_task():
    several = [
        replace(BASE, task_id=task, number=n, verdict="passed" if n < passed else "wrong")
        for task, passed in (("a", 5), ("b", 1))
        for n in range(5)
    ]
    row = measure("m", several)
    assert (row.passed, row.tasks, row.accuracy) == (6, 2, pytest.approx(60))
    assert row.pass_at == {1: pytest.approx(60), 5: pytest.approx(100)}


def test_latency_counts_time_with_requests_only():
    first, second = results("passed", "passed", seconds=4.0, ttft_s=0.5)
    together = measure("m", [first, replace(second, started_at=1.0)])
    assert (together.latency_batch_s, together.concurrency) == (2.5, 1.6)
    resumed = measure("m", [first, replace(second, started_at=9000.0)])
    assert (resumed.latency_batch_s, resumed.concurrency) == (4, 1)
    assert (resumed.latency_p50_s, resumed.ttft_p95_s) == (4, 0.5)
    assert measure("m", [BASE]).ttft_p50_s is None


@pytest.mark.parametrize(
    ("spans", "parts"),
    [
        ([], []),
        ([(0, 2), (1, 2)], [1.5, 1.5]),
        ([(5, 1), (0, 1)], [1, 1]),
        ([(0, 9), (1, 1), (2, 3)], [7, 0.5, 1.5]),
        ([(0, 6)] * 3, [2, 2, 2]),
        ([(3, 0), (0, 6)], [0, 6]),
    ],
)
def test_time_is_shared_by_those_that_ran(spans, parts):
    assert shared_seconds(spans) == parts


def test_budgets_that_were_asked_at_once_do_not_pay_for_each_other():
    short = results("passed", "passed", seconds=4.0, budget=1024)
    long = results("passed", "passed", seconds=4.0, budget=2048)
    assert measure("m", short).latency_batch_s == 2
    together = generation_seconds([*short, *long, replace(short[0], benchmark="humaneval-plus")])
    assert sum(together.values()) == 4
    rows = [measure("m", group, seconds_of=together) for group in (short, long)]
    assert [(row.latency_batch_s, row.concurrency) for row in rows] == [(1, 4), (1, 4)]


def test_time_per_token_is_that_behind_the_first():
    asked = results("passed", "passed", "passed", ttft_s=1.0, seconds=3.0)
    timed = [replace(r, tokens=tokens) for r, tokens in zip(asked, (5, 21, 1), strict=True)]
    row = measure("m", timed)
    assert (row.per_token_p50_s, row.per_token_p95_s) == (0.1, 0.5)
    unknown = measure("m", [replace(r, ttft_s=None) for r in timed])
    assert (unknown.per_token_p50_s, unknown.per_token_p95_s) == (None, None)


@pytest.mark.parametrize(("share", "value"), [(0.5, 3), (0.95, 5), (0.0, 1), (1.0, 5), (0.2, 1)])
def test_percentiles_are_nearest_ranks(share, value):
    assert percentile([1, 2, 3, 4, 5], share) == value


def test_kept_ratio():
    assert kept_ratio(3178, 13023) == pytest.approx(1 - 0.756, abs=5e-4)
    assert kept_ratio(0, 0) == 1


verdicts = st.sampled_from(["passed", "wrong", "timeout", "no-code", "sandbox-trouble", None])
random_results = st.lists(
    st.builds(
        replace,
        st.just(BASE),
        task_id=st.sampled_from("abcd"),
        number=st.integers(0, 3),
        verdict=verdicts,
        tokens=st.integers(0, 9),
        truncated=st.booleans(),
        started_at=st.floats(0, 50),
        seconds=st.floats(0, 5),
    ),
    min_size=1,
    max_size=16,
    unique_by=lambda r: (r.task_id, r.number),
)


@settings(deadline=None)
@given(random_results, st.randoms())
def test_rows_are_bounded_and_ignore_order(given_results, shuffler):
    row = measure("m", given_results)
    assert 0 <= row.accuracy <= 100
    assert sorted(row.pass_at.values()) == pytest.approx(list(row.pass_at.values()))
    assert row.no_code + row.timeouts <= 1
    assert 0 <= row.latency_batch_s <= sum(r.seconds for r in given_results) + 1e-6
    shuffled = list(given_results)
    shuffler.shuffle(shuffled)
    assert measure("m", shuffled) == row


def item(**fields):
    common = {"task_id": "t", "prompt": "q", "kind": "asserts", "entry_point": "f"}
    common |= {"test": "def check(f): ...", "time_limit_s": 1}
    given = {
        "id": "0" * 32,
        "tenant": "t",
        "model": "m",
        "config": EvalConfig(extractions=("strict", "lenient")),
        "problems": [Problem(benchmark=b, **common) for b in ("humaneval", "humaneval-plus")],
    }
    return EvalItem(**{**given, **fields})


def sample(number=0, **fields):
    given = {"task_id": "t", "number": number, "budget": 8, "text": "x", "completion_tokens": 8}
    given |= {"prompt_tokens": 1, "finish_reason": "length", "started_at": 1.0, "seconds": 2.0}
    return Sample(**{**given, **fields})


def test_an_item_gives_a_result_for_each_set_of_tests_and_way_of_reading():
    graded = GradedSample(
        benchmark="humaneval",
        budget=8,
        number=1,
        extraction="lenient",
        grade=Grade(verdict="passed", flags=("uses:gc",)),
    )
    asked = item(samples=[sample(0), sample(1)], grades=[graded])
    found = list(results_of(EvalItem.model_validate_json(asked.model_dump_json())))
    assert len(found) == 8
    passed = [r for r in found if r.passed]
    assert [(r.benchmark, r.number, r.extraction, r.flags) for r in passed] == [
        ("humaneval", 1, "lenient", ("uses:gc",))
    ]
    assert {r.verdict for r in found if not r.passed} == {None}
    assert all(r.truncated and not r.scored for r in found if not r.passed)
