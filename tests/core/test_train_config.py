from __future__ import annotations

import pytest
from pydantic import ValidationError

from asap.train_config import TRAIN_PRESETS, TrainConfig

CHANGES = {  # another value for each field
    "preset": "demo",
    "backend": "plain",
    "gpus": 0,
    "nodes": 2,
    "template": "chatml",
    "max_seq_length": 8192,
    "drop_empty_cot": False,
    "loss_on": "all",
    "mask_forced_prefix": False,
    "held_out_share": 0.05,
    "packing": True,
    "epochs": 3,
    "max_steps": 100,
    "batch_size": 2,
    "accumulation": 8,
    "learning_rate": 1e-5,
    "min_lr_rate": 0.0,
    "warmup_ratio": 0.0,
    "max_grad_norm": 1.0,
    "weight_decay": 0.1,
    "seed": 1,
    "precision": "float32",
    "gradient_checkpointing": False,
    "log_every": 1,
    "save_every": 5,
    "save_minutes": 5.0,
}


def test_every_field_changes_the_hash():
    assert set(CHANGES) == set(TrainConfig.model_fields)
    base = TrainConfig(backend="plain")
    hashes = {base.hash()}
    for name, value in CHANGES.items():
        changed = TrainConfig(**{"backend": "plain", name: value})
        assert getattr(changed, name) == value
        hashes.add(changed.hash())
    hashes.add(TrainConfig().hash())
    assert len(hashes) == 1 + len(CHANGES)


def test_round_trip_keeps_the_config_and_its_hash():
    for config in (TrainConfig(), TrainConfig(preset="demo"), TrainConfig(learning_rate=1e-5)):
        again = TrainConfig.model_validate_json(config.model_dump_json())
        assert again == config
        assert again.hash() == config.hash()


def test_equal_values_have_one_hash_however_they_are_written():
    assert TrainConfig(epochs=10).hash() == TrainConfig(epochs=10.0).hash() == TrainConfig().hash()


def test_explicit_values_win_over_the_preset():
    config = TrainConfig(preset="demo", max_steps=None, epochs=2, gpus=1)
    assert (config.max_steps, config.epochs, config.gpus) == (None, 2, 1)
    assert config.max_seq_length == TRAIN_PRESETS["demo"]["max_seq_length"]


def test_a_preset_leaves_other_values_as_they_are():
    demo, paper = TrainConfig(preset="demo"), TrainConfig()
    changed = {
        name for name in TrainConfig.model_fields if getattr(demo, name) != getattr(paper, name)
    }
    assert changed == {"preset", *TRAIN_PRESETS["demo"]}


def test_a_config_passes_through_where_one_is_validated():
    config = TrainConfig(preset="demo")
    assert TrainConfig.model_validate(config) is config


@pytest.mark.parametrize(
    "values",
    [
        {"preset": "papr"},
        {"backend": "deepspeed"},
        {"template": "llama"},
        {"epoch": 3},
        {"epochs": 0},
        {"epochs": float("inf")},
        {"learning_rate": 0},
        {"learning_rate": "nan"},
        {"learning_rate": "inf"},
        {"warmup_ratio": 1},
        {"min_lr_rate": -0.1},
        {"held_out_share": 1},
        {"max_steps": 0},
        {"batch_size": 0},
        {"seed": 2**32},
        {"max_seq_length": 8},
        {"precision": "float16"},
        {"gpus": -1, "backend": "plain"},
        {"gpus": 2},
        {"nodes": 2},
        {"gpus": 0, "nodes": 2, "backend": "plain"},
    ],
)
def test_impossible_values_are_refused(values):
    with pytest.raises(ValidationError):
        TrainConfig(**values)


def test_what_is_no_mapping_is_refused():
    with pytest.raises(ValidationError):
        TrainConfig.model_validate(["paper"])


def test_several_devices_need_the_plain_backend_and_the_message_says_so():
    with pytest.raises(ValidationError, match="take plain for several"):
        TrainConfig(gpus=2)
    config = TrainConfig(backend="plain", gpus=8, nodes=2)
    assert (config.gpus, config.nodes) == (8, 2)


def test_the_given_rate_wins_over_that_of_the_family():
    assert TrainConfig().peak_learning_rate("gemma") == 2e-5
    assert TrainConfig(learning_rate=1e-4).peak_learning_rate("qwen2") == 1e-4


def test_a_config_does_not_change():
    with pytest.raises(ValidationError):
        TrainConfig().epochs = 3
