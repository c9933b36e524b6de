"""TorchScorer against the naive path: full logits in float32, steps found by a loop over spans."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from asap.config import ScoreName
from asap.errors import CapacityError
from asap.ports import ScoreRequest
from asap.selection import remove_lowest
from asap.steps import join_steps, split_steps
from asap.surprisal import Context, build_context, plan_windows
from asap_surprisal.batching import plan_batches
from asap_surprisal.forward import CausalLM, float32_head, surprisal_and_entropy
from asap_surprisal.loading import load_model
from asap_surprisal.scorer import TorchScorer
from asap_surprisal.sequence import plan_sequence
from asap_surprisal.tokenization import HFTokenCounter
from tiny_model import SENTENCES, build_tiny_model

ALL_SCORES: tuple[ScoreName, ...] = get_args(ScoreName)
FIRST: tuple[ScoreName, ...] = ("first_token_surprisal",)
QUESTION = "What is the sum of x and y?"
STEPS = (
    "Okay, so I need to find the sum.",
    "    total = x + y",
    "Wait, let me check that again.",
    "然后我们检查 🙂",
    "So x is 3.",
    "🙂 done",
    "So x is 3.",
)
TOKENIZERS = ("tiny_model_dir", "tiny_model_no_bos_dir", "tiny_model_merging_dir")


def request_of(*steps: str, question: str = QUESTION, scores=ALL_SCORES, context="raw"):
    return ScoreRequest(question, tuple(steps or STEPS), tuple(scores), context)


def load(directory: Path, **changes) -> TorchScorer:
    """A CPU scorer on `directory`, with parts of its model replaced."""
    model = dataclasses.replace(load_model(str(directory), "cpu", "float32"), **changes)
    return TorchScorer("tiny", model, HFTokenCounter.load(str(directory)))


@pytest.fixture(scope="module")
def scorer(tiny_model_dir) -> TorchScorer:
    return TorchScorer.load(str(tiny_model_dir), device="cpu")


@cache
def full_model(directory: Path):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def log_softmax_of(directory: Path, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return full_model(directory)(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def naive_scores(directory: Path, request: ScoreRequest) -> dict[str, list[float]]:
    """All four scores, one sequence, every row of the vocabulary."""
    context = build_context(request.question, request.steps, request.context)
    encoding = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(
        context.text, add_special_tokens=False
    )
    bos = json.loads((directory / "tokenizer_config.json").read_text())["bos_token"]
    ids = [encoding.ids[0]] if bos is None else [full_model(directory).config.bos_token_id]
    ids = encoding.ids if bos is None else ids + encoding.ids
    shift = len(ids) - len(encoding.ids)
    log_p = log_softmax_of(directory, ids)
    entropy = -(log_p.exp() * log_p).sum(-1)
    found: dict[str, list[float]] = {name: [] for name in ALL_SCORES}
    for start, end in zip(context.starts, context.ends, strict=True):
        tokens = [i + shift for i, (a, b) in enumerate(encoding.offsets) if b > start and a < end]
        surprisals = [-log_p[t - 1, ids[t]].item() for t in tokens]
        entropies = [entropy[t - 1].item() for t in tokens]
        found["first_token_surprisal"].append(surprisals[0])
        found["first_token_entropy"].append(entropies[0])
        found["mean_surprisal"].append(sum(surprisals) / len(tokens))
        found["step_entropy"].append(sum(entropies) / len(tokens))
    return found


def toy_counter(*words: str) -> HFTokenCounter:
    """One token per word; blanks, `<think>` and zero-width spaces vanish."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))
    gone = Regex("(<think>|[ \u200b\n])+")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(gone, behavior="removed")
    return HFTokenCounter("toy", tokenizer)


def table_model(log_p: torch.Tensor) -> CausalLM:
    """A model whose next token depends on the previous one only. log_p: previous x next token."""

    def backbone(input_ids, use_cache):
        one_hot = torch.nn.functional.one_hot(input_ids, log_p.shape[0]).float()
        return SimpleNamespace(last_hidden_state=one_hot)

    return CausalLM(backbone, lambda states: states @ log_p, torch.device("cpu"))


# --- the scores themselves ---


@pytest.mark.parametrize("context", ["raw", "chat"])
@pytest.mark.parametrize("fixture", TOKENIZERS)
def test_equals_full_logits_path(fixture, context, request):
    directory = request.getfixturevalue(fixture)
    wanted = request_of(context=context)

    [scored] = load(directory).score_batch([wanted])

    expected = naive_scores(directory, wanted)
    for name in ALL_SCORES:
        assert scored.scores[name] == pytest.approx(expected[name], abs=1e-5), name


@pytest.mark.parametrize(("token", "surprisal"), [(0, 0.357), (1, 1.609), (2, 2.303)])
def test_hand_computed_distribution(token, surprisal):
    logits = torch.log(torch.tensor([[0.7, 0.2, 0.1]])) + 5.0  # any shift is the same distribution

    found, entropy = surprisal_and_entropy(logits, torch.tensor([token]))

    assert found.item() == pytest.approx(surprisal, abs=5e-4)
    assert entropy.item() == pytest.approx(0.8018, abs=5e-5)


def test_excluded_tokens_do_not_spoil_the_entropy():
    logits = torch.tensor([[0.0, 0.0, -math.inf]])
    _, entropy = surprisal_and_entropy(logits, torch.tensor([0]))
    assert entropy.item() == pytest.approx(math.log(2))


def test_toy_language_model():
    words = ("[unk]", "sep", "so", "wait", "x", "y", "z")
    p = torch.full((7, 7), 1 / 7)
    p[1] = torch.tensor([0.1, 0, 0.8, 0.1, 0, 0, 0]).clamp(min=1e-9)
    # the separator is a word of the step before, because this tokenizer drops blank lines
    scorer = TorchScorer("toy", table_model(p.log()), toy_counter(*words))

    [scored] = scorer.score_batch(
        [request_of("so x sep", "wait y sep", "so z", question="sep", scores=FIRST)]
    )

    surprisals = scored.scores["first_token_surprisal"]
    assert surprisals == pytest.approx((0.223, 2.303, 0.223), abs=5e-4)
    order = remove_lowest(surprisals, (1, 1, 1), (1, 1, 1), remove_steps=3, min_steps=0).removed
    assert order == (0, 2, 1)


def test_first_token_of_a_step_decides_not_its_text(scorer):
    [scored] = scorer.score_batch([request_of("So x.", "Wait.", "So x.", scores=FIRST)])
    first, _, second = scored.scores["first_token_surprisal"]
    assert first != second  # duplicates are distinct steps with their own context


def test_entropy_lies_between_zero_and_uniform(scorer):
    [scored] = scorer.score_batch([request_of()])
    for name in ("first_token_entropy", "step_entropy"):
        assert all(0 <= value <= math.log(512) for value in scored.scores[name])


def test_scores_are_what_json_keeps(scorer):
    [scored] = scorer.score_batch([request_of()])
    assert type(scored).model_validate_json(scored.model_dump_json()) == scored
    assert all(round(x, 6) == x for values in scored.scores.values() for x in values)


def test_deterministic(scorer):
    requests = [request_of(*STEPS[:n]) for n in range(1, 8)]
    assert scorer.score_batch(requests) == scorer.score_batch(requests)


def test_head_works_in_float32_on_narrow_weights():
    layer = torch.nn.Linear(8, 40000).bfloat16()
    states = torch.randn(3, 8).bfloat16()

    logits = float32_head(layer)(states)

    expected = states.float() @ layer.weight.float().T + layer.bias.float()
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected)


# --- first tokens ---


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


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_value_that_is_not_a_number_means_no_score(tiny_model_dir, bad):
    scorer = load(tiny_model_dir, head=lambda states: torch.full((len(states), 512), bad))
    [scored] = scorer.score_batch([request_of("So x.", "Wait.")])
    assert set(scored.scores["first_token_surprisal"]) == {None}


# --- counts ---


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


def test_real_traces_are_cut_at_every_step(real_traces, scorer):
    for trace in random.Random(0).sample(real_traces, 20):
        steps = split_steps(trace["cot"])
        [scored] = scorer.score_batch([request_of(*steps, question=trace["question"], scores=())])
        assert scored.flags == ()


# --- batches, windows, memory ---


def test_score_does_not_depend_on_the_batch(scorer):
    requests = [
        request_of(*(STEPS * repeat)[:n], question=QUESTION * (n % 3))
        for repeat in (1, 5)
        for n in range(1, 7 * repeat, 3)
    ]
    together = scorer.score_batch(requests)
    for request, scored in zip(requests, together, strict=True):
        [alone] = scorer.score_batch([request])
        assert scored.flags == alone.flags
        for name in ALL_SCORES:
            assert scored.scores[name] == pytest.approx(alone.scores[name], abs=1e-4)


def test_batches_hold_the_token_budget():
    lengths = [3, 500, 20, 100, 90, 7, 100]
    batches = plan_batches(lengths, 200)
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert batches[:2] == [[1], [3, 6]]
    for batch in batches[1:]:
        assert max(lengths[i] for i in batch) * len(batch) <= 200
    assert plan_batches([], 200) == []


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


def test_window_is_the_shorter_of_model_and_tokenizer(tiny_model_dir):
    model = load_model(str(tiny_model_dir), "cpu", "float32")
    tokenizer = Tokenizer.from_file(str(tiny_model_dir / "tokenizer.json"))
    for limit, window in ((100, 100), (5, 2048), (10**30, 2048), (None, 2048)):
        counter = HFTokenCounter("tiny", tokenizer, max_length=limit)
        assert TorchScorer("tiny", model, counter).window == window


def test_head_sees_the_needed_rows_alone(tiny_model_dir):
    rows = []
    head = load_model(str(tiny_model_dir), "cpu", "float32").head

    def recording(states):
        rows.append(len(states))
        return head(states)

    scorer = load(tiny_model_dir, head=recording)
    scorer.score_batch([request_of(*STEPS * 3, scores=ALL_SCORES[:2])])
    assert rows == [21]
    rows.clear()
    scorer.score_batch([request_of(*STEPS * 12)])
    assert len(rows) > 1
    assert max(rows) <= 1024


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_halves_the_batch_when_memory_is_short(tiny_model_dir, scorer, error):
    backbone, rows = load_model(str(tiny_model_dir), "cpu", "float32").backbone, []

    def small_device(input_ids, **options):
        rows.append(len(input_ids))
        if len(input_ids) > 2:
            raise error
        return backbone(input_ids=input_ids, **options)

    requests = [request_of(*STEPS[:n]) for n in range(1, 8)]
    scored = load(tiny_model_dir, backbone=small_device).score_batch(requests)
    assert rows == [7, 3, 1, 2, 4, 2, 2]
    for ours, usual in zip(scored, scorer.score_batch(requests), strict=True):
        assert ours.scores["step_entropy"] == pytest.approx(usual.scores["step_entropy"], abs=1e-4)


def test_one_sequence_that_does_not_fit_is_a_capacity_error(tiny_model_dir):
    def no_memory(**_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(CapacityError, match="one sequence of") as caught:
        load(tiny_model_dir, backbone=no_memory).score_batch([request_of(), request_of("So x.")])
    assert caught.value.retryable


def test_other_errors_of_the_model_are_not_taken_for_memory(tiny_model_dir):
    def broken(**_):
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        load(tiny_model_dir, backbone=broken).score_batch([request_of()])


def test_tokens_behind_the_last_position_are_not_run():
    context = Context("a b c d e", 2, (2, 6), (5, 9))  # steps "b c" and "d e"
    spans = [(i, i + 1) for i in range(0, 9, 2)]
    plan = plan_sequence(
        [10, 11, 12, 13, 14], spans, context, bos_id=1, window=100, every_token=False
    )
    [row] = plan.rows
    assert (row.ids, row.positions, row.targets) == ([1, 10, 11, 12], [1, 3], [11, 13])


# --- the port ---


async def test_scores_in_a_thread_of_its_own(tiny_model_dir, scorer):
    threads = []
    model = load_model(str(tiny_model_dir), "cpu", "float32")

    def backbone(**options):
        threads.append(threading.current_thread().name)
        return model.backbone(**options)

    threaded = load(tiny_model_dir, backbone=backbone)
    assert await threaded.score([request_of()]) == scorer.score_batch([request_of()])
    assert threads[0].startswith("surprisal")
    threaded.close()


def test_names(tiny_model_dir, scorer):
    assert scorer.name == scorer.tokenizer_name == str(tiny_model_dir)


def test_tokenizer_and_package_do_not_import_torch():
    code = (
        "import sys, asap_surprisal, asap_surprisal.tokenization, asap_surprisal.demo;"
        "sys.exit(sum(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_sentences_give_a_tokenizer_with_merges(tiny_model_merging_dir):
    counter = HFTokenCounter.load(str(tiny_model_merging_dir))
    assert counter.count(SENTENCES[0]) < len(SENTENCES[0])
    assert any("\n" in token and token.strip() for token in counter.encode(SENTENCES[0]).tokens)
