from __future__ import annotations

import pytest
from pydantic import ValidationError

from asap.eval_config import BENCHMARKS, EvalConfig, benchmark_of

PAPER_BUDGETS = {"humaneval": 6144, "humaneval-plus": 6144, "leetcode": 10240}
PAPER_BUDGETS |= {"livecodebench-v1-v3": 10240, "livecodebench-v4-v5": 10240}


def test_the_paper_preset_is_the_papers_protocol():
    config = EvalConfig(preset="paper")
    assert {name: config.budgets_of(name) for name in config.benchmarks} == {
        name: (budget,) for name, budget in PAPER_BUDGETS.items()
    }
    assert (config.temperature, config.samples, config.template) == (0, 1, "deepseek-r1")
    assert config.extractions == ("lenient", "strict")
    assert not config.add_imports
    sizes = [BENCHMARKS[name].tasks for name in config.benchmarks]
    assert sizes == [164, 164, 612, 268, 228]


def test_the_default_takes_code_from_the_answer_and_reports_both():
    config = EvalConfig()
    assert config.extractions == ("strict", "lenient")
    assert config.add_imports


def test_given_values_win_over_the_preset():
    config = EvalConfig(preset="demo", limit=3)
    assert (config.limit, config.budgets_of("humaneval")) == (3, (128, 256))
    assert EvalConfig(budgets=(7,)).budgets_of("humaneval") == (7,)


def test_unknown_benchmarks_get_a_long_budget_and_no_count():
    assert (benchmark_of("own").budget, benchmark_of("own").tasks) == (10240, None)


@pytest.mark.parametrize(
    "fields",
    [
        {"samples": 2},
        {"top_p": float("nan")},
        {"temperature": float("inf")},
        {"time_limit_s": float("inf")},
        {"budgets": (8, 8)},
        {"budgets": ()},
        {"budgets": (0,)},
        {"benchmarks": ()},
        {"extractions": ("strict", "strict")},
        {"unknown": 0},
    ],
)
def test_what_cannot_work_is_refused(fields):
    with pytest.raises(ValidationError):
        EvalConfig(**fields)
    assert EvalConfig(samples=2, temperature=0.6).samples == 2


def test_every_value_changes_the_hash():
    changes = {"limit": 1, "seed": 1, "budgets": (9,), "time_limit_s": 2, "add_imports": False}
    changes |= {"extractions": ("strict",), "top_p": 0.9, "temperature": 1, "template": "chatml"}
    hashes = [EvalConfig(**{name: value}).hash() for name, value in changes.items()]
    assert len({EvalConfig().hash(), *hashes}) == len(changes) + 1
