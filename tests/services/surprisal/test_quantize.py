"""Weights of one byte: what they cost in accuracy, what they save, and what they leave alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from asap_surprisal.loading import load_model
from asap_surprisal.quantize import Fp8Linear
from asap_surprisal.scorer import TorchScorer
from scoring import STEPS, TOKENIZERS, of_family, request_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_differ_by_the_rounding_of_weights_alone(dtype, bias):
    torch.manual_seed(0)
    layer = nn.Linear(256, 100, bias=bias).to(dtype)
    with torch.no_grad():
        layer.weight[7] *= 1e-4  # rows of any size, each with a scale of its own
        layer.weight[8] = 0
    narrow, states = Fp8Linear(copy.deepcopy(layer)), torch.randn(3, 5, 256).to(dtype)
    with torch.no_grad():
        ours, exact = narrow(states), layer(states)
        back = narrow.weight.float() * narrow.scale.float()[:, None]
    assert (ours.shape, ours.dtype) == (exact.shape, dtype)
    # three bits behind the point: at most a sixteenth of each weight, or half of the least step
    least = layer.weight.abs().amax(1, keepdim=True).float() * 2.0**-9 / 448
    assert ((back - layer.weight.float()).abs() <= layer.weight.float().abs() / 15 + least).all()
    error = (ours - exact).float().norm(dim=(0, 1)) / exact.float().norm(dim=(0, 1)).clamp(1e-9)
    assert error.max() < 0.06
    assert ours[..., 8].eq(0 if layer.bias is None else layer.bias[8]).all()


def test_the_largest_weight_of_a_row_stays_a_number():
    layer = nn.Linear(4, 3, bias=False).bfloat16()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 3e38, -3e38, 0], [1e-30, 0, 0, 0], [1, 1, 1, -7]]))
    narrow = Fp8Linear(layer)
    assert narrow.weight.float().isfinite().all()
    back = narrow.weight.float() * narrow.scale.float()[:, None]
    torch.testing.assert_close(back[2, 3], torch.tensor(-7.0), rtol=0.01, atol=0)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
def test_scores_stay_close_and_packs_stay_exact(request, tmp_path, tokenizer, family):
    directory = request.getfixturevalue(tokenizer)
    if family != "qwen2":
        directory = of_family(family, directory, tmp_path / family)
    requests = [request_of(*STEPS[:n]) for n in range(2, 8)]
    narrow = TorchScorer.load(str(directory), device="cpu", dtype="fp8")
    together = narrow.score_batch(requests)
    assert narrow.totals.passes == 1
    for one, packed in zip(requests, together, strict=True):
        [alone] = narrow.score_batch([one])
        assert packed.scores["mean_surprisal"] == pytest.approx(
            alone.scores["mean_surprisal"], abs=1e-5
        )
    wide = TorchScorer.load(str(directory), device="cpu").score_batch(requests)
    pairs = [
        (ours, theirs)
        for packed, usual in zip(together, wide, strict=True)
        for ours, theirs in zip(
            packed.scores["mean_surprisal"], usual.scores["mean_surprisal"], strict=True
        )
    ]
    assert any(ours != theirs for ours, theirs in pairs)
    ours, theirs = torch.tensor(pairs).T
    assert torch.corrcoef(torch.stack([ours, theirs]))[0, 1] > 0.8  # of random weights


def test_the_layers_alone_are_narrow_and_weigh_a_quarter_of_float32(tiny_model_dir):
    narrow = load_model(str(tiny_model_dir), "cpu", "fp8")
    wide = load_model(str(tiny_model_dir), "cpu", "float32")
    layers = [part for part in narrow.backbone.modules() if isinstance(part, Fp8Linear)]
    assert len(layers) == 14  # seven in each of two layers
    assert not [part for part in narrow.backbone.layers.modules() if type(part) is nn.Linear]
    assert narrow.backbone.embed_tokens.weight.dtype == narrow.dtype == torch.float32
    assert narrow.head.weight.dtype == torch.float32
    assert narrow.cost == wide.cost
    held = [sum(p.nbytes for p in one.backbone.layers.parameters()) for one in (narrow, wide)]
    assert held[0] < 0.28 * held[1]
