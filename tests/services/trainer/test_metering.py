"""Operations and pairs against counts by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2ForCausalLM

from asap_trainer.metering import StepCost, Work, peak_memory_bytes, peak_rate


def test_the_cost_of_a_model_is_that_of_its_matrices(tiny_model_dir):
    model = Qwen2ForCausalLM.from_pretrained(tiny_model_dir)
    cost = StepCost.of(model)
    layer = 128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 128  # q, o; k, v; the three of the MLP
    assert cost.token_weights == 2 * layer
    assert cost.attention == 2 * 4 * 32
    assert cost.head_weights == 128 * model.config.vocab_size
    assert cost.operations(tokens=10, loss_tokens=4, pairs=55) == 3 * (
        2 * (10 * cost.token_weights + 4 * cost.head_weights) + 4 * 55 * cost.attention
    )


def test_work_leaves_padding_out_and_begins_anew():
    work = Work()
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    labels = torch.tensor([[-100, 5, 6, -100], [-100, 7, -100, -100]])
    work.add({"labels": labels, "attention_mask": mask, "input_ids": mask})
    assert work.take() == {"tokens": 5, "loss_tokens": 3, "pairs": 6 + 3}
    assert work.take() == {"tokens": 0, "loss_tokens": 0, "pairs": 0}


def test_packed_samples_are_counted_like_samples_alone():
    work = Work()
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    work.add({"labels": torch.full((1, 5), 3), "position_ids": positions})
    assert work.take() == {"tokens": 5, "loss_tokens": 5, "pairs": 6 + 3}


def test_the_rate_of_this_machine_is_plausible():
    assert 1e8 < peak_rate(torch.device("cpu"), torch.float32) < 1e15


def test_the_memory_of_this_process_is_in_bytes():
    assert peak_memory_bytes(torch.device("cpu")) == pytest.approx(1e9, abs=2**35)
    assert peak_memory_bytes(torch.device("cpu")) > 50 * 2**20
