"""§3.4 and Appendix A as data: hyper-parameters, schedule, training string, and the loss on it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import asap_runtime.demo_model
from asap.sft import IGNORED, TEMPLATES, SftSample, encode_sample, learning_rate
from asap.train_config import TrainConfig
from file_encoder import FileEncoder

APPENDIX_A = {
    "preset": "paper",
    "backend": "unsloth",
    "epochs": 10,
    "max_seq_length": 16384,
    "batch_size": 1,
    "accumulation": 16,
    "precision": "bfloat16",
    "min_lr_rate": 0.1,
    "warmup_ratio": 0.03,
    "max_grad_norm": 0.2,
    "seed": 42,
    "loss_on": "response",  # §3.4, eq. 3
}
SCRIPTS = {  # where the paper is silent
    "gradient_checkpointing": True,
    "log_every": 10,
    "save_every": None,  # each epoch
    "max_steps": None,
    "weight_decay": 0.0,  # AdamW as the library has it
    "gpus": 1,
    "nodes": 1,
    "packing": False,
    "held_out_share": 0.0,
}
OURS = {
    "template": "auto",
    "drop_empty_cot": True,
    "mask_forced_prefix": True,
    "learning_rate": None,  # by family
    "save_minutes": 15,
}


def test_the_paper_preset_states_every_value():
    expected = {**APPENDIX_A, **SCRIPTS, **OURS}
    assert TrainConfig(preset="paper").model_dump() == expected
    assert TrainConfig() == TrainConfig(preset="paper")


def test_sixteen_samples_make_a_step():
    config = TrainConfig(preset="paper")
    assert config.batch_size * config.accumulation * config.gpus * config.nodes == 16


@pytest.mark.parametrize(("family", "peak"), [("qwen2", 4e-5), ("llama", 2e-5)])
def test_each_model_has_its_peak(family, peak):
    assert TrainConfig(preset="paper").peak_learning_rate(family) == peak


@pytest.mark.parametrize(("progress", "rate"), [(0, 4e-5), (0.5, 2.2e-5), (1, 4e-6)])
def test_the_rate_at_three_points_behind_the_warm_up(progress, rate):
    config, total = TrainConfig(preset="paper"), 1000
    warmup = 30
    step = warmup + progress * (total - warmup)
    assert learning_rate(int(step), total, config, 4e-5) == pytest.approx(rate, rel=1e-12)


def test_the_warm_up_takes_three_percent_of_the_steps_rounded_up():
    config = TrainConfig(preset="paper")
    for total in (100, 101, 6250):
        warmup = math.ceil(0.03 * total)
        assert learning_rate(warmup, total, config, 4e-5) == 4e-5
        assert learning_rate(warmup - 1, total, config, 4e-5) < 4e-5
        assert learning_rate(1, total, config, 4e-5) == pytest.approx(4e-5 / warmup)


SAMPLE = SftSample(
    id="cf-1",
    question="Print the sum of two integers.",
    cot="Read both numbers.\n\nThen add them.",
    answer="```python\nprint(sum(map(int, input().split())))\n```",
)
TARGET = (
    "<think>\nRead both numbers.\n\nThen add them.\n</think>\n"
    "```python\nprint(sum(map(int, input().split())))\n```"
)
GOLDEN = {
    "deepseek-r1": (
        "<｜begin▁of▁sentence｜><｜User｜>Print the sum of two integers."
        f"<｜Assistant｜>{TARGET}<｜end▁of▁sentence｜>"
    ),
    "chatml": (
        "<|im_start|>user\nPrint the sum of two integers.<|im_end|>\n"
        f"<|im_start|>assistant\n{TARGET}<|im_end|>"
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_training_string_to_the_letter(name):
    assert TEMPLATES[name].render(SAMPLE).text == GOLDEN[name]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_serving_string_is_the_same_up_to_the_opening_tag(name):
    forced = GOLDEN[name][: GOLDEN[name].index("<think>\n") + len("<think>\n")]
    assert TEMPLATES[name].prompt(SAMPLE.question) == forced


@pytest.mark.parametrize(
    ("values", "spelt"),
    [
        ({}, TARGET.removeprefix("<think>\n") + "<｜end▁of▁sentence｜>"),
        ({"mask_forced_prefix": False}, TARGET + "<｜end▁of▁sentence｜>"),
        ({"loss_on": "all"}, GOLDEN["deepseek-r1"]),
    ],
)
def test_the_loss_is_on_thinking_answer_and_eos(values, spelt):
    encoder = FileEncoder(Path(asap_runtime.demo_model.__file__).parent)
    config = TrainConfig(preset="paper", **values)
    example = encode_sample(SAMPLE, TEMPLATES["deepseek-r1"], encoder, config)
    labels = [label for label in example.labels if label != IGNORED]
    assert encoder.tokenizer.decode(labels, skip_special_tokens=False) == spelt
    assert example.input_ids.count(encoder.bos_id) == 1
    assert example.labels[-1] == encoder.eos_id
