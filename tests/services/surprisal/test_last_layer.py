"""The last layer at the needed places gives what it gives there when it runs at all of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from asap_surprisal.attention import PACKED, PackedRow, Packing
from asap_surprisal.last_layer import only_needed_places
from scoring import of_family

IDS = torch.arange(900) % 90
PLACES = torch.cat([torch.arange(600), torch.arange(300)])
NEEDED = ((0, 7, 8, 599), (3,))


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "llama", "mistral"])
def backbone(request, tiny_model_dir, tmp_path_factory):
    source = tiny_model_dir
    if request.param != "qwen2":
        source = of_family(request.param, source, tmp_path_factory.mktemp("m") / request.param)
    return AutoModelForCausalLM.from_pretrained(source, attn_implementation=PACKED).base_model


def run(backbone, *needed):
    """Last states of two rows of which those are needed, and the operations behind them."""
    rows = [PackedRow(size, needed=some) for size, some in zip((600, 300), needed, strict=True)]
    packing = Packing(rows, IDS.device)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        states = backbone(
            input_ids=IDS[None], position_ids=PLACES[None], packing=packing, use_cache=False
        ).last_hidden_state
    return states, packing.needed, counter.get_total_flops()


@pytest.mark.parametrize("needed", [NEEDED, ((), (0, 299))])
def test_states_are_those_of_the_whole_layer(backbone, needed):
    whole, places, _ = run(backbone, *needed)
    assert whole.shape[1] == 900
    handle = only_needed_places(backbone.layers[-1])
    try:
        few, _, _ = run(backbone, *needed)
    finally:
        handle.remove()
    assert few.shape[1] == sum(map(len, needed))
    torch.testing.assert_close(few, whole[:, places], rtol=1e-5, atol=1e-5)


def test_a_pack_of_which_nothing_is_needed_runs_whole(backbone):
    handle = only_needed_places(backbone.layers[-1])
    try:
        states, _, _ = run(backbone, (), ())
    finally:
        handle.remove()
    assert states.shape[1] == 900


def test_its_work_is_saved(backbone):
    _, _, whole = run(backbone, *NEEDED)
    handle = only_needed_places(backbone.layers[-1])
    try:
        _, _, few = run(backbone, *NEEDED)
    finally:
        handle.remove()
    layers = len(backbone.layers)
    assert few < whole * (layers - 0.4) / layers


def test_other_calls_are_as_before(backbone):
    backbone.set_attn_implementation("sdpa")
    expected = backbone(input_ids=IDS[None, :9], use_cache=False).last_hidden_state
    handle = only_needed_places(backbone.layers[-1])
    try:
        found = backbone(input_ids=IDS[None, :9], use_cache=False).last_hidden_state
    finally:
        handle.remove()
        backbone.set_attn_implementation(PACKED)
    assert torch.equal(found, expected)


def test_a_layer_with_attention_of_its_own_is_refused():
    class Mixer(nn.Module):
        def forward(self, states, packing=None):
            return states.cumsum(1)

    layer = Mixer()
    only_needed_places(layer)
    with pytest.raises(TypeError, match="packed attention"):
        layer(
            torch.ones(1, 3, 2), packing=Packing([PackedRow(3, needed=(0,))], torch.device("cpu"))
        )
