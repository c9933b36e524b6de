from __future__ import annotations

import pytest

from asap.errors import InvalidInput
from asap.eval_config import EvalConfig
from asap_cli.eval_options import eval_values
from asap_cli.options import read_config

NOTHING = (None, None, None, None, None, None)


def test_only_what_was_asked_for_is_a_value():
    values = eval_values(*NOTHING, "paper")
    assert {name: value for name, value in values.items() if value is not None} == {
        "preset": "paper"
    }
    assert read_config(EvalConfig, [], **values).extractions == ("lenient", "strict")


def test_lists_are_given_by_commas_or_again_and_k_is_1024_as_in_the_paper():
    values = eval_values(["a,b", "c"], "2k, 4096,6K", 3, 2, 0.6, "strict", "default")
    config = read_config(EvalConfig, [], **values)
    assert config.benchmarks == ("a", "b", "c")
    assert config.budgets == (2048, 4096, 6144)
    assert (config.limit, config.samples, config.temperature) == (3, 2, 0.6)
    assert config.extractions == ("strict",)


@pytest.mark.parametrize("budgets", ["4x", "-1", "k", "1.5k"])
def test_a_budget_that_is_none_is_named(budgets):
    with pytest.raises(InvalidInput, match="--budget"):
        eval_values(None, budgets, None, None, None, None, None)
