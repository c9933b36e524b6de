"""What the device did: operations as torch counts them, totals as the work was."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from asap.ports import ScoreRequest, ScoreSession
from asap_surprisal.metering import PassCost
from scoring import FIRST, QUESTION, STEPS, load, request_of


def test_operations_are_those_that_torch_counts(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, attn_implementation="eager")
    cost = PassCost.of(model.base_model, model.get_output_embeddings(), whole=True)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.ones(1, 500, dtype=torch.int64))
    ours = cost.operations(whole=500, reused=0, positions=500)
    # this attention computes all pairs of tokens, ours the half that is causal
    full = ours + 4 * cost.attention * (500 * 500 - 500 * 501 // 2)
    assert counter.get_total_flops() == pytest.approx(full, rel=0.001)


def test_the_last_layer_counts_at_needed_positions(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    parts = model.base_model, model.get_output_embeddings()
    whole, few = PassCost.of(*parts, whole=True), PassCost.of(*parts, whole=False)
    layers = model.base_model.layers
    weights = sum(part.numel() for part in layers[-1].parameters() if part.ndim == 2)
    assert few.position_weights - whole.position_weights == weights > 0
    assert whole.token_weights - few.token_weights == weights
    assert few.attention * len(layers) == whole.attention * (len(layers) - 1)


def test_reused_tokens_cost_nothing_but_attention_to_them():
    cost = PassCost(token_weights=100, attention=3, position_weights=7)
    assert cost.operations(whole=3, reused=0, positions=1) == 2 * (300 + 7) + 12 * (1 + 2 + 3)
    assert cost.operations(whole=3, reused=2, positions=1) == 2 * (100 + 7) + 12 * 3


def test_totals_of_a_scorer(tiny_model_dir):
    scorer, session = load(tiny_model_dir), ScoreSession()
    first = request_of(scores=FIRST)
    tokens = scorer.prepare(first).tokens
    scorer.score_batch([first, first])
    assert scorer.totals.passes == 1
    assert (scorer.totals.rows, scorer.totals.steps) == (2, 2 * len(STEPS))
    assert scorer.totals.tokens == 2 * tokens
    assert scorer.totals.busy_s > 0
    before = scorer.totals
    for _ in range(2):
        scorer.score_batch([ScoreRequest(QUESTION, STEPS, FIRST, session=session)])
    after = scorer.totals
    assert after.tokens - before.tokens + after.tokens_reused == 2 * tokens
    assert after.operations - before.operations < before.operations


def test_the_peak_is_a_rate(tiny_model_dir):
    assert load(tiny_model_dir).peak_rate() > 1e8  # any processor of this century
