from __future__ import annotations

import pytest
from pydantic import ValidationError

from asap.problems import CallCase, Problem, Sample, StdinCase

ADD = {
    "benchmark": "own",
    "task_id": "add",
    "prompt": "Add.",
    "kind": "asserts",
    "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
    "time_limit_s": 3,
}


def sample(**fields):
    given = {"task_id": "add", "number": 0, "budget": 64, "text": "x", "completion_tokens": 1}
    given |= {"prompt_tokens": 1, "finish_reason": "stop", "started_at": 0, "seconds": 1}
    return Sample(**{**given, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"test": None},
        {"kind": "call"},
        {"calls": [CallCase(args=(1,), expected=1)]},
        {"entry_point": None},
        {"kind": "stdin", "test": None, "streams": [StdinCase(input="", output="")]},
        {"time_limit_s": 0},
    ],
    ids=["no tests", "other kind", "two kinds", "no entry", "entry for stdin", "no time"],
)
def test_a_problem_holds_tests_of_its_kind_alone(fields):
    assert Problem(**ADD).kind == "asserts"
    with pytest.raises(ValidationError):
        Problem(**{**ADD, **fields})


def test_the_hash_is_of_the_content_and_survives_json():
    problem = Problem(**ADD)
    assert Problem.model_validate_json(problem.model_dump_json()).sha256 == problem.sha256
    for field, other in {"test": "def check(f): ...", "prompt": "Sum.", "time_limit_s": 4}.items():
        assert Problem(**{**ADD, field: other}).sha256 != problem.sha256


def test_only_the_budget_truncates():
    assert [sample(finish_reason=reason).truncated for reason in ("length", "stop", "abort")] == [
        True,
        False,
        False,
    ]
