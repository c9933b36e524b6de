"""Packed scores are those of one sequence alone, of a padded batch and of the full logits."""

from __future__ import annotations

import weakref
from itertools import pairwise

import pytest
import torch
from torch.nn.attention import varlen
from transformers import AutoModelForCausalLM

from asap_surprisal.attention import (
    KeyValues,
    PackedRow,
    Packing,
    _by_kernel,
    packed_attention,
)
from asap_surprisal.loading import load_model
from asap_surprisal.scorer import TorchScorer
from asap_surprisal.tokenization import HFTokenCounter
from scoring import (
    ALL_SCORES,
    QUESTION,
    STEPS,
    TOKENIZERS,
    full_model,
    load,
    naive_scores,
    of_family,
    request_of,
    with_words,
)

REQUESTS = [
    request_of(*(STEPS * repeat)[:n], question=QUESTION * (n % 3 + 1))
    for repeat in (1, 5)
    for n in range(1, 7 * repeat, 3)
]


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "llama", "mistral"])
def family(request):
    return request.param


@pytest.fixture(scope="module", params=[*TOKENIZERS, "words"])
def directory(request, family, tmp_path_factory):
    """A model of each family with each tokenizer."""
    words = request.param == "words"
    source = request.getfixturevalue("tiny_model_no_bos_dir" if words else request.param)
    root = tmp_path_factory.mktemp("pairs")
    if words:
        source = with_words(source, root / "words")
    return source if family == "qwen2" else of_family(family, source, root / family)


def test_packed_equals_alone_and_full_logits(directory):
    scorer = load(directory)
    together = scorer.score_batch(REQUESTS)
    assert (scorer.totals.passes, scorer.totals.rows) == (1, len(REQUESTS))
    for request, packed in zip(REQUESTS, together, strict=True):
        [alone] = scorer.score_batch([request])
        expected = naive_scores(directory, request)
        assert packed.flags == alone.flags
        for name in ALL_SCORES:
            assert packed.scores[name] == pytest.approx(alone.scores[name], abs=1e-5), name
            assert packed.scores[name] == pytest.approx(expected[name], abs=1e-5), name


def test_packed_equals_a_padded_batch(directory):
    scorer = load(directory)
    plans = [scorer.prepare(request).plan for request in REQUESTS]
    rows = [plan.rows[0] for plan in plans]
    longest = max(len(row.ids) for row in rows)
    padded = torch.tensor([row.ids + [0] * (longest - len(row.ids)) for row in rows])
    with torch.inference_mode():
        log_p = full_model(directory)(padded).logits.float().log_softmax(-1)
    scored = scorer.score_batch(REQUESTS)
    for at, (row, plan, packed) in enumerate(zip(rows, plans, scored, strict=True)):
        found = [-log_p[at, p, t].item() for p, t in zip(row.positions, row.targets, strict=True)]
        first = [found[row.tokens.index(step[0])] for step in plan.steps]
        assert packed.scores["first_token_surprisal"] == pytest.approx(first, abs=1e-5)


def test_bfloat16_pack_equals_alone(directory):
    model = load_model(str(directory), "cpu", "bfloat16")
    scorer = TorchScorer("tiny", model, HFTokenCounter.load(str(directory)))
    for request, packed in zip(REQUESTS, scorer.score_batch(REQUESTS), strict=True):
        [alone] = scorer.score_batch([request])
        for name in ALL_SCORES:
            assert packed.scores[name] == pytest.approx(alone.scores[name], abs=1e-3), name


@pytest.mark.parametrize("other", ["gemma2", "longrope"])
def test_attention_of_another_kind_runs_row_by_row(tiny_model_dir, tmp_path, other):
    directory = of_family(other, tiny_model_dir, tmp_path / "m")
    scorer = load(directory)
    requests = [*REQUESTS[:2], REQUESTS[-1]]
    scored = scorer.score_batch(requests)
    assert scorer.totals.passes == 3
    for request, ours in zip(requests, scored, strict=True):
        assert ours.scores["step_entropy"] == pytest.approx(
            naive_scores(directory, request)["step_entropy"], abs=1e-5
        )


@pytest.mark.parametrize("window", [None, 7, 700])
def test_a_row_continued_is_the_row_at_once(window):
    torch.manual_seed(0)
    heads, shared, sizes, reused = 4, 2, (1300, 40), (600, 1)
    query = torch.randn(1, heads, sum(sizes), 16)
    key, value = torch.randn(2, 1, shared, sum(sizes), 16)
    layer = torch.nn.Module()
    layer.layer_idx = 0
    grown = [KeyValues() for _ in sizes]

    def run(rows, *parts):
        return packed_attention(
            layer, *parts, None, packing=Packing(rows, query.device), sliding_window=window
        )[0]

    whole = run(
        [PackedRow(n, grown=kept) for n, kept in zip(sizes, grown, strict=True)], query, key, value
    )
    rows = [PackedRow(n - r, r, kept) for n, r, kept in zip(sizes, reused, grown, strict=True)]
    behind = [slice(600, 1300), slice(1301, 1340)]
    parts = [torch.cat([part[:, :, one] for one in behind], dim=2) for part in (query, key, value)]

    again = run(rows, *parts)

    expected = torch.cat([whole[:, one] for one in behind], dim=1)
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-5)
    allowed = torch.ones(1300, 1300, dtype=torch.bool).tril()
    if window:
        allowed = allowed.triu(1 - window)
    naive = torch.nn.functional.scaled_dot_product_attention(
        query[:, :, :1300], key[:, :, :1300], value[:, :, :1300], allowed, enable_gqa=True
    )
    torch.testing.assert_close(whole[:, :1300], naive.transpose(1, 2), rtol=0, atol=1e-5)


def test_kept_states_do_not_hold_the_pack():
    key, value = torch.randn(2, 1, 2, 100, 16)
    grown = KeyValues()
    rows = [PackedRow(10, grown=grown), PackedRow(90)]
    list(Packing(rows, key.device).split(key, value, 0))
    assert all(part.untyped_storage().nbytes() == 2 * 10 * 16 * 4 for part in grown.layers[0])


def test_rows_behind_a_known_beginning_are_not_all_there_at_once():
    known = KeyValues(layers=[tuple(torch.randn(2, 1, 2, 100, 16))])
    rows = [PackedRow(1, 100, known) for _ in range(3)]
    key, value = torch.randn(2, 1, 2, 3, 16)
    parts, living = Packing(rows, key.device).split(key, value, 0), []
    for _ in rows:
        keys, values = next(parts)
        assert keys.shape == values.shape == (1, 2, 101, 16)
        living.append(weakref.ref(keys))
        del keys, values
    assert [one() is not None for one in living] == [False, False, True]


def test_models_of_transformers_keep_their_own_attention(tiny_model_dir):
    load_model(str(tiny_model_dir), "cpu", "float32")
    assert (
        AutoModelForCausalLM.from_pretrained(tiny_model_dir).config._attn_implementation == "sdpa"
    )


def documented_kernel(
    query, key, value, query_ends, key_ends, most_q, most_k, *, scale, window_size, enable_gqa
):
    """What torch documents of `varlen_attn`, which runs on a GPU alone: one row after another,
    the last query aligned with the last key."""
    left, right = window_size
    assert (right, enable_gqa) == (0, True)
    assert (most_q, most_k) == (query_ends.diff().max(), key_ends.diff().max())
    rows = []
    for (a, b), (c, d) in zip(
        pairwise(query_ends.tolist()), pairwise(key_ends.tolist()), strict=True
    ):
        q, k, v = (part.transpose(0, 1)[None] for part in (query[a:b], key[c:d], value[c:d]))
        mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - b + a)
        if left >= 0:
            mask = mask.triu(d - c - b + a - left)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, mask, scale=scale, enable_gqa=True
        )
        rows.append(out[0].transpose(0, 1))
    return torch.cat(rows)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("continued", [False, True])
def test_the_kernel_of_the_gpu_is_asked_for_the_same(monkeypatch, window, continued):
    monkeypatch.setattr(varlen, "varlen_attn", documented_kernel)
    query, (key, value) = torch.randn(1, 4, 60, 16), torch.randn(2, 1, 2, 60, 16)
    layer = torch.nn.Module()
    layer.layer_idx = 0
    old = KeyValues([tuple(torch.randn(2, 1, 2, 9, 16))]) if continued else None
    rows = [PackedRow(40), PackedRow(15, 8 if continued else 0, old), PackedRow(5)]
    packing = Packing(rows, query.device)
    there = _by_kernel(layer, query, key, value, packing, 0.3, window)
    here, _ = packed_attention(
        layer, query, key, value, None, packing=packing, scaling=0.3, sliding_window=window
    )
    torch.testing.assert_close(there, here, rtol=0, atol=1e-5)
