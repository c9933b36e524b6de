from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asap.config import PruneConfig, ScoreName
from asap.errors import InvalidInput
from asap.fine import count_tokens, fine_prune, rebudget
from asap.steps import join_steps
from asap.types import CoarseBlock, Record, StepScores, Triple
from fakes import TableScorer, count_words
from strategies import steps as step_lists

# Lengths and scores of the worked example: A 4 tokens, B 3, C 5, D 2
COT = "a a a a\n\nb b b\n\nc c c c c\n\nd d"
SCORES = (0.2, 2.1, 0.9, 0.9)


def table(*scores):
    return TableScorer(lambda steps: scores)


def record(cot=COT, **config):
    triple = Triple(id="x", question="q", cot=cot, answer="a")
    return Record(triple=triple, config=PruneConfig(method="asap_stage2", **config))


async def pruned(scorer=None, cot=COT, **config):
    [done] = await fine_prune([record(cot, **config)], scorer or table(*SCORES))
    return done


@pytest.mark.parametrize(
    ("target", "kept"),
    [
        ({"max_tokens": 17}, (0, 1, 2, 3)),
        ({"max_tokens": 16}, (1, 2, 3)),
        ({"max_tokens": 11}, (1, 3)),
        ({"max_tokens": 2}, (1,)),
        ({"keep_ratio": 0.4}, (1, 3)),  # 6 of 17
        ({"step_ratio": 0.5}, (1, 3)),
        ({"step_ratio": 0.7}, (1, 2, 3)),
        ({"max_tokens": 11, "refill": True}, (0, 1, 3)),
        ({"max_tokens": 8, "protect_first": 1}, (0, 1)),
        ({"max_tokens": 6, "protect_last": 2}, (2, 3)),  # both protected: over budget
        ({"max_tokens": 2, "min_steps": 0}, ()),
    ],
)
async def test_targets(target, kept):
    done = await pruned(**target)
    assert done.kept_steps == kept
    assert done.pruned_cot == join_steps([COT.split("\n\n")[i] for i in kept])
    assert ("over_budget" in done.flags) == (done.tokens.pruned > (done.fine.max_tokens or 99))


async def test_a_cot_within_budget_is_returned_byte_for_byte_and_still_scored():
    cot = "  a a\r\n\r\n\r\nb b \n"
    done = await pruned(table(1.0, 2.0), cot, max_tokens=100)
    assert (done.pruned_cot, done.status) == (cot, "unchanged")
    assert done.fine.scored.scores["first_token_surprisal"] == (1.0, 2.0)


async def test_scoring_within_budget_can_be_switched_off():
    scorer = table(1.0, 2.0)
    done = await pruned(scorer, "a\n\nb", max_tokens=100, score_within_budget=False)
    assert scorer.requests[0].scores == ()
    assert done.fine.scored.scores == {}
    with pytest.raises(InvalidInput, match=r"no first_token_surprisal .* with score_within"):
        rebudget(done, PruneConfig(method="asap_stage2", max_tokens=1))


async def test_another_score_than_those_kept_is_named_in_the_refusal():
    done = await pruned(max_tokens=11)
    other = PruneConfig(method="asap_stage2", max_tokens=11, score="step_entropy")
    with pytest.raises(InvalidInput, match="prune it again with score='step_entropy'"):
        rebudget(done, other)


async def test_all_scores_answer_for_any_rule_later():
    done = await pruned(max_tokens=17, all_scores=True)
    assert set(done.fine.scored.scores) == set(get_args(ScoreName))
    for score in get_args(ScoreName):
        full = await pruned(max_tokens=11, all_scores=True, score=score)
        again = rebudget(done, full.config)
        assert (again.kept_steps, again.tokens) == (full.kept_steps, full.tokens)
    assert len((await pruned(max_tokens=17)).fine.scored.scores) == 2


async def test_a_scorer_is_asked_for_what_it_offers_alone():
    class Few(TableScorer):
        offers = frozenset({"first_token_surprisal", "mean_surprisal"})

    scorer = Few(lambda steps: SCORES)
    await pruned(scorer, max_tokens=11, all_scores=True)
    assert set(scorer.requests[0].scores) == Few.offers


async def test_duplicate_steps_are_told_apart_by_index():
    done = await pruned(table(5, 3, 1), "x\n\ny\n\nx", max_tokens=3)
    assert done.pruned_cot == "x\n\ny"


async def test_empty_and_single_step_cots():
    scorer = table(1.0)
    empty = await pruned(scorer, " \n ", max_tokens=1)
    assert (empty.pruned_cot, empty.flags, scorer.requests) == (" \n ", ("empty_cot",), [])
    single = await pruned(table(), "one long step", max_tokens=1)
    assert (single.kept_steps, single.flags) == ((0,), ("over_budget",))


async def test_missing_scores_keep_their_step_and_are_flagged():
    done = await pruned(table(None, 2.1, 0.9, 0.9), max_tokens=8)
    assert done.kept_steps == (0, 1)
    assert "score_missing" in done.flags


async def test_repo_preset_counts_bos():
    def with_bos(steps):
        return SCORES

    class Bos(TableScorer):
        async def score(self, requests):
            return [s.model_copy(update={"bos": 1}) for s in await super().score(requests)]

    [done] = await fine_prune([record(count_bos=True, max_tokens=12)], Bos(with_bos))
    assert done.fine.max_tokens == 11
    assert done.kept_steps == (1, 3)


class Merging(TableScorer):
    """A tokenizer whose separator costs nothing."""

    def count(self, text):
        return len(text.split())


class Splitting(TableScorer):
    """A tokenizer whose separator costs three tokens, and one by itself."""

    def count(self, text):
        return len(text.split()) + 3 * text.count("\n\n")


async def test_counts_that_do_not_add_up_fall_back_to_real_tokenisations():
    scorer = Merging(lambda steps: SCORES)
    done = await pruned(scorer, max_tokens=10)
    assert "counts_not_additive" in done.flags
    assert done.kept_steps == (1, 2, 3)  # 10 words; by the sums it would be 12
    with pytest.raises(InvalidInput, match="do not add"):
        rebudget(done, done.config)


async def test_random_and_truncate_need_counts_only():
    for method, kept in (("truncate", (0, 1)), ("random", None)):
        scorer = table(*SCORES)
        triple = Triple(id="x", question="q", cot=COT, answer="a")
        one = Record(triple=triple, config=PruneConfig(method=method, max_tokens=8))
        [done] = await fine_prune([one], scorer)
        [again] = await fine_prune([one], scorer)
        assert scorer.requests[0].scores == ()
        assert done == again
        assert kept in (None, done.kept_steps)
        assert done.tokens.pruned <= 8


async def test_random_removes_every_step_equally_often():
    cot = "\n\n".join("abcd")
    removed = [0] * 4
    for seed in range(400):
        triple = Triple(id="x", question="q", cot=cot, answer="a")
        one = Record(triple=triple, config=PruneConfig(method="random", step_ratio=0.75, seed=seed))
        [done] = await fine_prune([one], table(*SCORES))
        [gone] = set(range(4)) - set(done.kept_steps)
        removed[gone] += 1
    assert all(60 <= count <= 140 for count in removed)  # 100 expected, 4.6 standard deviations


def by_neighbours(steps):
    """Scores that depend on the context: a step's own digit plus that of the step before it."""
    values = [int(step.split()[0]) for step in steps]
    return [v + (values[i - 1] if i else 0) for i, v in enumerate(values)]


CHAIN = "\n\n".join(f"{n} w w" for n in (3, 1, 4, 1, 5, 9, 2, 6))


async def test_iterative_rescores_what_is_left():
    scorer = TableScorer(by_neighbours)
    done = await pruned(scorer, CHAIN, mode="iterative", max_tokens=11)
    left = list(range(8))
    values = CHAIN.split("\n\n")
    while count_words(join_steps([values[i] for i in left])) > 11:
        scores = by_neighbours([values[i] for i in left])
        left.pop(scores.index(min(scores)))
    assert done.kept_steps == tuple(left)
    assert len(scorer.requests) == 8 - len(left)


@pytest.mark.parametrize("scorer", [TableScorer, Merging, Splitting])
async def test_iterative_in_one_round_equals_global(scorer):
    whole = await pruned(scorer(by_neighbours), CHAIN, max_tokens=11)
    rounds = await pruned(
        scorer(by_neighbours), CHAIN, mode="iterative", rescore_every=8, max_tokens=11
    )
    assert whole.kept_steps == rounds.kept_steps
    assert whole.fine.removed == rounds.fine.removed
    assert set(whole.flags) == set(rounds.flags)


@pytest.mark.parametrize(("scorer", "steps", "tokens"), [(Merging, 3, 9), (Splitting, 2, 9)])
async def test_iterative_counts_really_where_counts_do_not_add_up(scorer, steps, tokens):
    done = await pruned(scorer(by_neighbours), CHAIN, mode="iterative", max_tokens=11)
    assert (len(done.kept_steps), done.tokens.pruned) == (steps, tokens)  # one more is above 11
    assert "counts_not_additive" in done.flags
    with pytest.raises(InvalidInput, match="do not add"):
        rebudget(done, done.config)


async def test_missing_scores_are_flagged_in_rounds_too():
    scorer = TableScorer(lambda steps: [None, *by_neighbours(steps)[1:]])
    done = await pruned(scorer, CHAIN, mode="iterative", max_tokens=11)
    assert done.kept_steps[0] == 0
    assert "score_missing" in done.flags


async def test_iterative_runs_can_be_rebudgeted_upwards_only():
    low = await pruned(TableScorer(by_neighbours), CHAIN, mode="iterative", max_tokens=7)
    for budget in (11, 20, 100):
        full = await pruned(TableScorer(by_neighbours), CHAIN, mode="iterative", max_tokens=budget)
        assert rebudget(low, full.config).kept_steps == full.kept_steps
    with pytest.raises(InvalidInput, match="needs the scorer again"):
        rebudget(low, full.config.model_copy(update={"max_tokens": 3}))


async def test_iterative_by_step_ratio():
    done = await pruned(TableScorer(by_neighbours), CHAIN, mode="iterative", step_ratio=0.5)
    assert len(done.kept_steps) == 4
    with pytest.raises(InvalidInput, match="by tokens only"):
        rebudget(done, done.config)


@given(
    steps=step_lists,
    first=st.integers(1, 40),
    second=st.integers(1, 40),
    data=st.data(),
)
async def test_rebudget_equals_a_full_run_at_that_budget(steps, first, second, data):
    scores = data.draw(
        st.lists(st.floats(0, 9), min_size=len(steps), max_size=len(steps)), label="scores"
    )
    cot = join_steps(steps)
    scorer = TableScorer(lambda given_steps: scores)
    start = await pruned(scorer, cot, max_tokens=first)
    full = await pruned(scorer, cot, max_tokens=second)
    assert rebudget(start, full.config) == full
    assert full.tokens.pruned <= second or "over_budget" in full.flags
    kept = full.kept_steps
    assert list(kept) == sorted(set(kept))
    assert [full.source_steps[i] for i in kept] == [steps[i] for i in kept]


async def test_stage_two_works_on_the_steps_that_stage_one_kept():
    scorer = TableScorer(lambda steps: [float(len(step)) for step in steps])
    block = CoarseBlock(protocol="select", model="m", kept=(0, 2, 3), status="accepted")
    both = record(max_tokens=8).with_coarse(block)
    [done] = await fine_prune([both], scorer)
    assert scorer.requests[0].steps == ("a a a a", "c c c c c", "d d")
    assert done.kept_steps == (2,)
    assert (done.tokens.original, done.tokens.coarse, done.tokens.pruned) == (17, 13, 5)


def test_rebudget_of_a_record_without_stage_two_changes_the_config_only():
    one = count_tokens(record(), table())
    assert rebudget(one, PruneConfig(method="original")).pruned_cot == COT


def test_a_method_that_ranks_nothing_is_refused():
    scored = StepScores(tokens=(1, 1), tokens_joined=(2, 2), total=3)
    from asap.types import FineBlock

    block = FineBlock(
        method="original",
        scorer="s",
        tokenizer="t",
        max_tokens=1,
        kept=(0, 1),
        removed=(),
        scored=scored,
    )
    one = count_tokens(record("a\n\nb"), table()).with_fine(block)
    with pytest.raises(InvalidInput, match="does not rank steps"):
        rebudget(one, PruneConfig(method="original", max_tokens=1))
