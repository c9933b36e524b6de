from __future__ import annotations

import pytest
from pydantic import ValidationError

from asap.config import PruneConfig
from asap.eval_config import EvalConfig
from asap.train_config import TrainConfig


def test_default_target_is_the_papers_budget():
    assert PruneConfig().max_tokens == 4096


@pytest.mark.parametrize("target", [{"keep_ratio": 0.5}, {"step_ratio": 0.5}])
def test_another_target_replaces_the_budget_of_any_preset(target):
    for preset in ("default", "paper", "repo"):
        assert PruneConfig(preset=preset, **target).max_tokens is None


@pytest.mark.parametrize(
    "values",
    [
        {"max_tokens": 0},
        {"max_tokens": 5, "keep_ratio": 0.5},
        {"keep_ratio": 1.5},
        {"keep_ratio": 0},
        {"tau": 2},
        {"budget": 5},
        {"preset": "papr"},
        {"max_attempts": 0},
        {"refill": True, "mode": "iterative"},
        {"refill": True, "step_ratio": 0.5},
    ],
)
def test_impossible_values_are_refused(values):
    with pytest.raises(ValidationError):
        PruneConfig(**values)


def test_explicit_values_win_over_the_preset():
    config = PruneConfig(preset="repo", autojunk=False, max_tokens=9)
    assert (config.autojunk, config.max_tokens, config.answer_code) == (False, 9, "first")


def test_round_trip_keeps_the_config_and_its_hash():
    for config in (PruneConfig(), PruneConfig(preset="paper"), PruneConfig(keep_ratio=0.3)):
        again = PruneConfig.model_validate_json(config.model_dump_json())
        assert again == config
        assert again.hash() == config.hash()


def test_every_field_changes_the_hash():
    base = PruneConfig()
    for change in ({"tau": 0.7}, {"seed": 1}, {"max_tokens": 5}, {"method": "random"}):
        assert PruneConfig(**change).hash() != base.hash()


@pytest.mark.parametrize("config", [PruneConfig, TrainConfig, EvalConfig])
@pytest.mark.parametrize("preset", [{}, [], None, 1, "unknown"])
def test_a_preset_that_is_no_name_is_refused_like_any_wrong_value(config, preset):
    with pytest.raises(ValidationError, match="preset"):
        config.model_validate({"preset": preset})
