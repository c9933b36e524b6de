"""Counts: like transformers', of every step and of the whole, without a forward pass."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from asap.ports import ScoreRequest
from asap.steps import join_steps, split_steps
from asap_surprisal.loading import load_model
from asap_surprisal.tokenization import HFTokenCounter
from scoring import ALL_SCORES, QUESTION, STEPS, TOKENIZERS, load, request_of
from tiny_model import SENTENCES


@pytest.mark.parametrize("fixture", TOKENIZERS[:2])
def test_counts_like_the_tokenizer_of_transformers(fixture, request):
    directory = request.getfixturevalue(fixture)
    counter, theirs = HFTokenCounter.load(str(directory)), AutoTokenizer.from_pretrained(directory)
    for text in ("", *STEPS, join_steps(STEPS)):
        assert counter.count(text) == len(theirs(text, add_special_tokens=False)["input_ids"])
    assert counter.bos_id == theirs.bos_token_id


@pytest.mark.parametrize("fixture", TOKENIZERS)
def test_counts_of_steps_and_of_the_whole(fixture, request):
    scorer = load(request.getfixturevalue(fixture))
    [scored] = scorer.score_batch([request_of(scores=())])
    assert scored.tokens == tuple(map(scorer.count, STEPS))
    assert scored.tokens_joined == tuple(scorer.count(step + "\n\n") for step in STEPS)
    assert scored.total == scorer.count(join_steps(STEPS))
    assert scored.bos == (fixture != "tiny_model_no_bos_dir")
    additive = sum(scored.tokens_joined[:-1]) + scored.tokens[-1] == scored.total
    assert additive == ("counts_not_additive" not in scored.flags)
    assert additive == (fixture != "tiny_model_merging_dir")


def test_counts_alone_need_no_forward_pass(tiny_model_dir):
    def backbone(**_):
        raise AssertionError

    [scored, empty] = load(tiny_model_dir, backbone=backbone).score_batch(
        [request_of(scores=()), ScoreRequest(QUESTION, (), ALL_SCORES)]
    )
    assert scored.scores == {}
    assert (empty.tokens, empty.total, empty.flags) == ((), 0, ())
    assert set(empty.scores.values()) == {()}


def test_exactly_one_bos(tiny_model_dir):
    seen = []
    model = load_model(str(tiny_model_dir), "cpu", "float32")

    def backbone(input_ids, **options):
        seen.append(input_ids)
        return model.backbone(input_ids=input_ids, **options)

    scorer = load(tiny_model_dir, backbone=backbone)
    scorer.score_batch([request_of()])

    bos = HFTokenCounter.load(str(tiny_model_dir)).bos_id
    assert seen[0][0, 0] == bos
    assert (seen[0] == bos).sum() == 1


def test_real_traces_are_cut_at_every_step(real_traces, tiny_model_dir):
    scorer = load(tiny_model_dir)
    for trace in random.Random(0).sample(real_traces, 20):
        steps = split_steps(trace["cot"])
        [scored] = scorer.score_batch([request_of(*steps, question=trace["question"], scores=())])
        assert scored.flags == ()


def test_tokenizer_and_package_do_not_import_torch():
    code = (
        "import sys, asap_surprisal, asap_surprisal.tokenization, asap_runtime.demo_model;"
        "sys.exit(sum(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_sentences_give_a_tokenizer_with_merges(tiny_model_merging_dir):
    counter = HFTokenCounter.load(str(tiny_model_merging_dir))
    assert counter.count(SENTENCES[0]) < len(SENTENCES[0])
    assert any("\n" in token and token.strip() for token in counter.encode(SENTENCES[0]).tokens)
