from __future__ import annotations

import pytest
from pydantic import ValidationError

from asap.eval_config import EvalConfig
from asap.eval_items import EvalItem, GradedSample, Machines
from asap.grades import Grade
from asap.problems import Problem, ProblemRef, Sample

QUESTION = {"task_id": "t", "prompt": "q"}


def problem(benchmark="humaneval", **fields):
    given = {"kind": "asserts", "entry_point": "f", "test": "def check(f): ...", "time_limit_s": 1}
    return Problem(benchmark=benchmark, **{**QUESTION, **given, **fields})


def sample(number=0):
    return Sample(
        task_id="t",
        number=number,
        budget=8,
        text="x",
        completion_tokens=8,
        prompt_tokens=1,
        finish_reason="stop",
        started_at=1.0,
        seconds=2.0,
    )


def graded(number=0, verdict="passed"):
    return GradedSample(
        benchmark="humaneval",
        budget=8,
        number=number,
        extraction="strict",
        grade=Grade(verdict=verdict),
    )


def item(**fields):
    given = {"id": "0" * 32, "tenant": "t", "model": "m", "config": EvalConfig()}
    return EvalItem(**{**given, "problems": [problem()], **fields})


def test_an_item_grows_and_survives_json():
    whole = item().grown(samples=[sample()]).grown(grades=[graded()])
    assert EvalItem.model_validate_json(whole.model_dump_json()) == whole
    assert whole.prompt == "q"


def test_a_large_problem_is_a_reference_that_asks_the_same():
    stored = problem("humaneval-plus")
    ref = ProblemRef(benchmark="humaneval-plus", **QUESTION, sha256=stored.sha256, key="t/p")
    whole = item(problems=[problem(), ref])
    assert EvalItem.model_validate_json(whole.model_dump_json()).problems == (problem(), ref)


def test_its_budgets_are_those_of_its_benchmarks():
    assert item().budgets == (6144,)
    assert item(problems=[problem("own")]).budgets == (10240,)
    own = EvalConfig(budgets=[8, 16])
    assert item(config=own, problems=[problem(), problem("own")]).budgets == (8, 16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"problems": []}, "at least 1"),
        ({"problems": [problem(), problem("humaneval-plus", prompt="r")]}, "the same question"),
        ({"problems": [problem(), problem()]}, "different benchmarks"),
        ({"samples": [sample(), sample()]}, "same budget and number"),
        ({"samples": [sample()], "grades": [graded(1)]}, "of no sample"),
        ({"problems": [problem(), problem("own")]}, "the same budgets"),
        ({"model_sha256": "1" * 64}, "both a prefix and a hash"),
        ({"model_prefix": "t/runs/x/model"}, "both a prefix and a hash"),
        ({"id": "x"}, "pattern"),
    ],
)
def test_an_item_that_contradicts_itself_is_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        item(**fields)


def test_machines_are_told_once_each_in_any_order():
    met = [
        item(engine={"vllm": version}, sandbox={"level": level})
        for version, level in (("2", "landlock"), ("1", "landlock"), ("2", "namespaces"))
    ]
    told = Machines([*met, item()]).told()
    assert told == {
        "engines": [{"vllm": "1"}, {"vllm": "2"}],
        "sandboxes": [{"level": "landlock"}, {"level": "namespaces"}],
    }
    assert Machines(reversed(met)).told() == told
    assert Machines().told() == {"engines": [], "sandboxes": []}
