"""The budget of a batch: what a token really needs, and what is really free."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import Qwen2Config, Qwen2ForCausalLM

from asap_surprisal.attention import KeyValues
from asap_surprisal.forward import PassRow, launch
from asap_surprisal.loading import causal_lm
from asap_surprisal.memory import _left_in_group, free_bytes, plan_budget, token_bytes
from asap_surprisal.scorer import TorchScorer
from asap_surprisal.sequence import Row

SHAPE = SimpleNamespace(
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors, made inside, that were alive at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._seen = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage):
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self._seen or not size:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key, size):
        self._seen.discard(key)
        self.now -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inner", "heads"), [(256, 4), (64, 8)])
def test_a_pass_stays_within_what_its_tokens_are_planned_with(dtype, inner, heads):
    shape = vars(SHAPE) | {"intermediate_size": inner, "num_attention_heads": heads, "head_dim": 16}
    config = Qwen2Config(**shape, max_position_embeddings=8192)
    model = causal_lm(Qwen2ForCausalLM(config).to(dtype).eval())
    assert model.packs
    height, _ = token_bytes(config, dtype.itemsize)
    rows = [PassRow(Row([5] * size, [size - 1], [5], [size])) for size in (3000, 500, 1500)]
    with LiveBytes() as live:
        launch(model, rows).values()
    assert 0.3 * height * 5000 < live.peak <= 1.1 * height * 5000


def test_kept_states_weigh_what_is_planned():
    config = Qwen2Config(**vars(SHAPE))
    model, grown = causal_lm(Qwen2ForCausalLM(config).eval()), KeyValues()
    launch(model, [PassRow(Row([5] * 100, [99], [5], [100]), grown=grown)])
    held = sum(part.nbytes for layer in grown.layers for part in layer)
    assert held == 100 * token_bytes(config, 4)[1]


def test_the_budget_follows_free_memory():
    height, states = token_bytes(SHAPE, 4)
    head = SHAPE.vocab_size * 2048
    budget = plan_budget(SHAPE, 4, "cpu", head + 2000 * height)
    assert budget.batch == budget.longest == 1000
    assert budget.kept == 500 * height // states
    assert plan_budget(SHAPE, 4, "cpu", 10**12).batch == 4096
    assert plan_budget(SHAPE, 4, "cpu", 10**12).longest > 10**6
    assert plan_budget(SHAPE, 4, "cuda", 10**12).batch == 32768
    tight = plan_budget(SHAPE, 4, "cpu", 0)
    assert (tight.batch, tight.kept) == (256, 0)


def test_free_memory_is_a_part_of_the_machine():
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**50


def test_cached_files_of_a_container_are_free_and_mapped_ones_are_not(tmp_path):
    assert _left_in_group(tmp_path, 7) == 7  # no control group
    (tmp_path / "memory.current").write_text("900\n")
    stat = "anon 100\nfile 800\nfile_mapped 300\ninactive_file 500\nactive_file 300\n"
    (tmp_path / "memory.stat").write_text(stat)
    for limit, left in (("max", 7), ("1000", 600), ("100", 0)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert _left_in_group(tmp_path, 7) == left


def test_a_scorer_takes_its_budget_from_the_device(tiny_model_dir):
    chosen = TorchScorer.load(str(tiny_model_dir), device="cpu")
    fixed = TorchScorer.load(str(tiny_model_dir), device="cpu", max_batch_tokens=100)
    assert 256 <= chosen.max_batch_tokens <= 4096
    assert (fixed.max_batch_tokens, fixed.max_text_tokens) == (100, 100)
    assert chosen.max_text_tokens is None  # its window of 2048 tokens fits
