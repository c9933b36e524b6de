"""First tokens and windows: which token of which step is scored, behind what."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tokenizers import Tokenizer

from asap.steps import join_steps
from asap.surprisal import Context, build_context, plan_windows
from asap_surprisal.loading import load_model
from asap_surprisal.scorer import TorchScorer
from asap_surprisal.sequence import plan_sequence
from asap_surprisal.tokenization import HFTokenCounter
from scoring import (
    FIRST,
    STEPS,
    load,
    log_softmax_of,
    request_of,
    table_model,
    toy_counter,
)
from tiny_model import build_tiny_model


@pytest.fixture(scope="module")
def scorer(tiny_model_dir) -> TorchScorer:
    return load(tiny_model_dir)


def test_flags_merged_boundaries(tiny_model_merging_dir, scorer):
    [merging] = load(tiny_model_merging_dir).score_batch([request_of()])
    [cutting] = scorer.score_batch([request_of()])
    assert "merged_boundary" in merging.flags
    assert "merged_boundary" not in cutting.flags


def test_first_character_of_several_tokens_is_scored_by_the_first(scorer, tiny_model_dir):
    [scored] = scorer.score_batch([request_of("So x.", "🙂 done", scores=FIRST)])
    assert scored.flags == ("partial_first_token",)
    encoding = HFTokenCounter.load(str(tiny_model_dir)).encode("🙂 done")
    assert encoding.offsets[0] == encoding.offsets[1] == (0, 1)


def test_no_left_context_means_no_score():
    words = ("[unk]", "so", "x")
    scorer = TorchScorer("toy", table_model(torch.zeros(3, 3)), toy_counter(*words))
    [scored] = scorer.score_batch([request_of("so x", "so", question="")])
    assert scored.flags == ("no_left_context",)
    assert [values[0] for values in scored.scores.values()] == [None] * 4
    assert scored.scores["first_token_surprisal"][1] == pytest.approx(math.log(3), abs=1e-6)


def test_step_that_the_tokenizer_drops_has_no_score():
    scorer = TorchScorer("toy", table_model(torch.zeros(2, 2)), toy_counter("[unk]", "so"))
    [scored] = scorer.score_batch([request_of("so", "\u200b", "so", "\u200b", question="so")])
    for values in scored.scores.values():
        assert values == (pytest.approx(0.693147), None, pytest.approx(0.693147), None)


def test_tokens_behind_the_last_position_are_not_run():
    context = Context("a b c d e", 2, (2, 6), (5, 9))  # steps "b c" and "d e"
    spans = [(i, i + 1) for i in range(0, 9, 2)]
    plan = plan_sequence(
        [10, 11, 12, 13, 14], spans, context, bos_id=1, window=100, every_token=False
    )
    [row] = plan.rows
    assert (row.ids, row.positions, row.targets) == ([1, 10, 11, 12], [1, 3], [11, 13])


def test_question_is_truncated_before_the_cot(tmp_path):
    directory = build_tiny_model(tmp_path / "short", max_positions=64)
    scorer = load(directory)
    wanted = request_of(*STEPS[:3], question="start " * 100 + "end", scores=FIRST)

    [scored] = scorer.score_batch([wanted])

    counter = HFTokenCounter.load(str(directory))
    ids = counter.encode(build_context(wanted.question, wanted.steps).text).ids
    log_p = log_softmax_of(directory, [counter.bos_id, *ids[-63:]])
    at, expected = 64 - counter.count(join_steps(wanted.steps)), []
    for step in wanted.steps:
        token = counter.encode(step).ids[0]
        expected.append(-log_p[at - 1, token].item())
        at += counter.count(step + "\n\n")
    assert scored.flags == ("question_truncated",)
    assert scored.scores["first_token_surprisal"] == pytest.approx(expected, abs=1e-5)


def test_long_cot_is_scored_in_windows(tmp_path):
    directory = build_tiny_model(tmp_path / "short", max_positions=64)
    scorer, wanted = load(directory), request_of(*STEPS * 4, scores=FIRST)

    [scored] = scorer.score_batch([wanted])

    counter = HFTokenCounter.load(str(directory))
    context = build_context(wanted.question, wanted.steps)
    encoding = counter.encode(context.text)
    ids = [counter.bos_id, *encoding.ids]
    expected = []
    for start in context.starts:
        token = next(i for i, (_, end) in enumerate(encoding.offsets, 1) if end > start)
        for window in plan_windows(len(ids), 64):
            if window.score_from <= token < window.stop:
                log_p = log_softmax_of(directory, ids[window.start : window.stop])
                expected.append(-log_p[token - 1 - window.start, ids[token]].item())
    assert scored.flags == ("windowed", "partial_first_token")
    assert scored.scores["first_token_surprisal"] == pytest.approx(expected, abs=1e-5)


def test_window_is_the_models_own(tiny_model_dir):
    """Tokenizers of reasoning models were seen to say an eighth of it."""
    model = load_model(str(tiny_model_dir), "cpu", "float32")
    tokenizer = Tokenizer.from_file(str(tiny_model_dir / "tokenizer.json"))
    silent = dataclasses.replace(model, max_positions=None)
    for limit, of_tokenizer in ((100, 100), (5, 2**31), (10**30, 10**30), (None, 2**31)):
        counter = HFTokenCounter("tiny", tokenizer, max_length=limit)
        assert TorchScorer("tiny", model, counter).window == 2048
        assert TorchScorer("tiny", silent, counter).window == of_tokenizer
