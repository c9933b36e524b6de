"""Rounds that reuse keys and values give the scores of rounds that start anew, for less work."""

from __future__ import annotations

import gc
import random

import pytest

from asap.config import PruneConfig
from asap.fine import fine_prune
from asap.ports import ScoreRequest, ScoreSession
from asap.types import Record, Triple
from asap_surprisal.prefix import PrefixStore
from asap_surprisal.scorer import TorchScorer
from asap_surprisal.sequence import Row
from scoring import ALL_SCORES, FIRST, QUESTION, STEPS, load, of_family

MANY = tuple(f"{step} {i}" for i, step in enumerate(STEPS * 4))


class Forgetful:
    """The naive loop: the same scorer, to which every round is new."""

    def __init__(self, scorer: TorchScorer):
        self._scorer = scorer
        self.name, self.tokenizer_name, self.count = (
            scorer.name,
            scorer.tokenizer_name,
            scorer.count,
        )

    async def score(self, requests):
        return await self._scorer.score(
            [ScoreRequest(one.question, one.steps, one.scores, one.context) for one in requests]
        )


def record(**config) -> Record:
    triple = Triple(id="x", question=QUESTION, cot="\n\n".join(MANY), answer="3")
    settings = {"method": "asap_stage2", "mode": "iterative"} | config
    return Record(triple=triple, config=PruneConfig(**settings))


@pytest.fixture(params=["qwen2", "mistral"])
def directory(request, tiny_model_dir, tmp_path):
    if request.param == "qwen2":
        return tiny_model_dir
    return of_family(request.param, tiny_model_dir, tmp_path / "m")


@pytest.mark.parametrize("scores", [FIRST, ALL_SCORES])
def test_rounds_equal_fresh_scores(directory, scores):
    scorer, session, left = load(directory), ScoreSession(), list(MANY)
    chance = random.Random(0)
    while len(left) > 3:
        [kept] = scorer.score_batch([ScoreRequest(QUESTION, tuple(left), scores, session=session)])
        [fresh] = scorer.score_batch([ScoreRequest(QUESTION, tuple(left), scores)])
        for name in scores:
            assert kept.scores[name] == pytest.approx(fresh.scores[name], abs=1e-5), name
        for _ in range(3):
            left.pop(chance.randrange(len(left)))
    assert scorer.totals.tokens_reused > scorer.totals.tokens / 10


def test_scores_that_the_last_round_did_not_have_are_computed(tiny_model_dir):
    scorer, session = load(tiny_model_dir), ScoreSession()
    scorer.score_batch([ScoreRequest(QUESTION, MANY, FIRST, session=session)])
    wanted = ScoreRequest(QUESTION, MANY, ALL_SCORES, session=session)
    [kept], [fresh] = scorer.score_batch([wanted]), load(tiny_model_dir).score_batch([wanted])
    assert kept.scores["step_entropy"] == pytest.approx(fresh.scores["step_entropy"], abs=1e-5)


def test_several_sessions_share_a_pass(tiny_model_dir):
    scorer, sessions = load(tiny_model_dir), [ScoreSession() for _ in range(3)]
    for cut in (0, 5, 9):
        requests = [
            ScoreRequest(QUESTION * (i + 1), MANY[: 20 - i - cut] + MANY[-4:], FIRST, session=one)
            for i, one in enumerate(sessions)
        ]
        kept = scorer.score_batch(requests)
        fresh = load(tiny_model_dir).score_batch(requests)
        for ours, theirs in zip(kept, fresh, strict=True):
            assert ours.scores["first_token_surprisal"] == pytest.approx(
                theirs.scores["first_token_surprisal"], abs=1e-5
            )
    assert scorer.totals.passes == 3
    assert scorer.totals.tokens_reused > 0


@pytest.mark.parametrize("rescore_every", [1, 4])
async def test_iterative_pruning_equals_the_naive_loop(tiny_model_dir, rescore_every):
    scorer = load(tiny_model_dir)
    one = record(step_ratio=0.3, max_tokens=None, rescore_every=rescore_every)
    [ours] = await fine_prune([one], scorer)
    spent = scorer.totals
    [naive] = await fine_prune([one], Forgetful(scorer))
    assert ours.fine.removed == naive.fine.removed
    assert len(ours.fine.removed) == 19
    assert spent.tokens < 0.8 * (scorer.totals.tokens - spent.tokens)


async def test_one_round_for_all_removals_equals_global(tiny_model_dir):
    scorer = load(tiny_model_dir)
    limits = {"max_tokens": 150}
    [rounds] = await fine_prune([record(rescore_every=len(MANY), **limits)], scorer)
    [whole] = await fine_prune([record(mode="global", **limits)], scorer)
    assert rounds.fine.removed == whole.fine.removed != ()
    assert rounds.fine.scored == whole.fine.scored


async def test_a_finished_record_leaves_nothing_behind(tiny_model_dir):
    scorer = load(tiny_model_dir)
    await fine_prune([record(step_ratio=0.5, max_tokens=None)], scorer)
    gc.collect()
    assert scorer.totals.tokens_reused > 0
    assert scorer._store.tokens == 0


async def test_records_of_one_call_take_turns_in_a_small_store(tiny_model_dir):
    tokens = load(tiny_model_dir).prepare(ScoreRequest(QUESTION, MANY, FIRST)).tokens
    one = record(step_ratio=0.5, max_tokens=None)
    reused = []
    for records in ([one], [one] * 3):
        scorer = load(tiny_model_dir)
        scorer._store = PrefixStore(max_tokens=tokens)
        await fine_prune(records, scorer)
        reused.append(scorer.totals.tokens_reused)
    assert reused[1] > 2.5 * reused[0] > 0  # only the first pass of the others was kept from them


def row(*ids: int) -> Row:
    """One row whose every token is scored."""
    n = len(ids)
    return Row(list(ids[:-1]), list(range(n - 1)), list(ids[1:]), list(range(1, n)))


def test_a_full_store_takes_no_new_session_and_keeps_the_old():
    store, first, second = PrefixStore(max_tokens=5), ScoreSession(), ScoreSession()
    kept = store.begin(first, row(1, 2, 3, 4, 5))
    kept.values = dict.fromkeys((1, 2, 3, 4), (0.5, 0.5))
    assert store.begin(second, row(1, 2, 3, 4)).work.grown is None
    again = store.begin(first, row(1, 2, 3, 9))
    # tokens 1 2 3 are common; behind the 3 comes another token, so the 3 is run again
    assert (again.work.reused, again.work.row.positions, again.work.row.targets) == (2, [2], [9])
    assert again.known == {1: (0.5, 0.5), 2: (0.5, 0.5)}
    assert store.tokens == 3


def test_a_round_that_failed_is_not_reused():
    store, session = PrefixStore(max_tokens=100), ScoreSession()
    store.begin(session, row(1, 2, 3, 4))
    assert store.begin(session, row(1, 2, 3, 4)).work.reused == 0


def test_sessions_that_end_make_room():
    store, session = PrefixStore(max_tokens=5), ScoreSession()
    store.begin(session, row(1, 2, 3, 4, 5))
    del session
    gc.collect()
    assert store.tokens == 0
