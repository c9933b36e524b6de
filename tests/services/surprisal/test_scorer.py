"""TorchScorer against the naive path: full logits in float32, steps found by a loop over spans."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import threading

import pytest
import torch

from asap.errors import CapacityError
from asap.ports import ScoreSession
from asap.selection import remove_lowest
from asap_surprisal.forward import float32_head, surprisal_and_entropy
from asap_surprisal.loading import load_model
from asap_surprisal.scorer import TorchScorer
from asap_surprisal.tokenization import HFTokenCounter
from scoring import (
    ALL_SCORES,
    FIRST,
    STEPS,
    TOKENIZERS,
    load,
    naive_scores,
    request_of,
    table_model,
    toy_counter,
)


@pytest.fixture(scope="module")
def scorer(tiny_model_dir) -> TorchScorer:
    return load(tiny_model_dir)


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


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_value_that_is_not_a_number_means_no_score(tiny_model_dir, bad):
    scorer = load(tiny_model_dir, head=lambda states: torch.full((len(states), 512), bad))
    [scored] = scorer.score_batch([request_of("So x.", "Wait.")])
    assert set(scored.scores["first_token_surprisal"]) == {None}


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
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_halves_the_batch_when_memory_is_short(tiny_model_dir, scorer, error):
    backbone, rows = load_model(str(tiny_model_dir), "cpu", "float32").backbone, []

    def small_device(packing, **options):
        rows.append(len(packing.rows))
        if len(packing.rows) > 2:
            raise error
        return backbone(packing=packing, **options)

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


async def test_a_device_that_is_lost_is_a_lack_of_capacity(tiny_model_dir):
    def lost(**_):
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    scorer = load(tiny_model_dir, backbone=lost)
    with pytest.raises(CapacityError, match="new start") as caught:
        await scorer.score([request_of(), request_of("So x.")])
    assert (caught.value.problem_code, caught.value.retryable) == ("not-ready", True)
    scorer.close()


def test_other_errors_of_the_model_are_not_taken_for_memory(tiny_model_dir):
    def broken(**_):
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        load(tiny_model_dir, backbone=broken).score_batch([request_of()])


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


def test_names(tiny_model_dir):
    scorer = TorchScorer.load(str(tiny_model_dir), device="cpu")
    assert scorer.name == scorer.tokenizer_name == str(tiny_model_dir)


class Watching(HFTokenCounter):
    """A tokenizer that calls back with each text that it encodes."""

    seen = staticmethod(lambda text: None)

    def encode(self, text):
        self.seen(text)
        return super().encode(text)


async def test_the_next_call_is_tokenised_while_the_device_works(tiny_model_dir):
    model, order = load_model(str(tiny_model_dir), "cpu", "float32"), []
    busy, tokenised = threading.Event(), threading.Event()

    def backbone(**options):
        busy.set()
        order.append(tokenised.wait(30))
        return model.backbone(**options)

    counter = Watching.load(str(tiny_model_dir))
    counter.seen = lambda text: tokenised.set() if text.startswith("second") else None
    scorer = TorchScorer("tiny", dataclasses.replace(model, backbone=backbone), counter)
    first = asyncio.create_task(scorer.score([request_of(question="first")]))
    await asyncio.to_thread(busy.wait, 30)
    second = asyncio.create_task(scorer.score([request_of(question="second")]))
    both = [*await first, *await second]
    assert order == [True, True]
    expected = load(tiny_model_dir).score_batch(
        [request_of(question="first"), request_of(question="second")]
    )
    for ours, theirs in zip(both, expected, strict=True):
        assert ours.scores["step_entropy"] == pytest.approx(theirs.scores["step_entropy"], abs=1e-5)
    scorer.close()


async def test_prepared_requests_need_no_tokenizer(tiny_model_dir):
    scorer = load(tiny_model_dir)
    requests = [request_of(), request_of("So x.", scores=())]
    prepared = [scorer.prepare(request) for request in requests]
    expected = scorer.score_batch(requests)
    scorer._counter = None
    assert await scorer.score_prepared(prepared) == expected
    assert prepared[0].tokens > sum(expected[0].tokens)
    assert prepared[1].tokens == 0


def test_kept_states_go_first_when_memory_is_short(tiny_model_dir):
    model, fails = load_model(str(tiny_model_dir), "cpu", "float32"), []

    def backbone(**options):
        if fails:
            raise fails.pop()
        return model.backbone(**options)

    scorer, session = load(tiny_model_dir, backbone=backbone), ScoreSession()
    request = dataclasses.replace(request_of(), session=session)
    scorer.score_batch([request])
    assert scorer._store.tokens > 0
    fails.append(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(CapacityError):
        scorer.score_batch([request_of()])
    assert scorer._store.tokens == 0
    assert scorer.score_batch([request]) == scorer.score_batch([request_of()])
