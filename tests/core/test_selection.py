from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asap.selection import remove_lowest, token_budget

LENGTHS = (4, 3, 5, 2)  # steps A B C D, one token a word; a separator is one token
JOINED = tuple(n + 1 for n in LENGTHS)
SCORES = (0.2, 2.1, 0.9, 0.9)
A, B, C, D = range(4)


def select(budget, **options):
    return remove_lowest(SCORES, LENGTHS, JOINED, max_tokens=budget, **options)


@pytest.mark.parametrize(
    ("budget", "kept", "tokens"),
    [
        (17, (A, B, C, D), 17),
        (16, (B, C, D), 12),
        (12, (B, C, D), 12),
        (11, (B, D), 6),
        (10, (B, D), 6),
        (6, (B, D), 6),
    ],
)
def test_worked_example(budget, kept, tokens):
    choice = select(budget)
    assert (choice.kept, choice.tokens, choice.over_budget) == (kept, tokens, False)


def test_worked_example_keeps_one_step_over_budget():
    choice = select(2)
    assert (choice.kept, choice.removed, choice.over_budget) == ((B,), (A, C, D), True)


def test_repo_preset_can_remove_everything():
    assert select(2, min_steps=0).kept == ()


def test_worked_example_with_refill():
    # C does not fit (12), A fits (11)
    assert select(11, refill=True).kept == (A, B, D)


def test_equal_scores_remove_the_earlier_step_first():
    assert select(6).removed == (A, C)


def test_duplicate_steps_are_removed_by_index():
    # steps [x, y, x] with scores [5, 3, 1]: the third goes, not the first
    assert remove_lowest((5, 3, 1), (1, 1, 1), (2, 2, 2), remove_steps=1).kept == (0, 1)


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_steps_without_score_stay(missing):
    assert remove_lowest((missing, 1, 2), (1, 1, 1), (2, 2, 2), max_tokens=1).kept == (0,)


def test_protected_steps_are_never_removed():
    assert select(6, protected=frozenset({A})).kept == (A,)


@pytest.mark.parametrize(
    ("ratio", "tokens", "budget"), [(0.29, 100, 29), (0.9, 100, 90), (0.1, 30, 3), (1.0, 7, 7)]
)
def test_ratio_budgets_survive_floating_point(ratio, tokens, budget):
    assert token_budget(max_tokens=None, keep_ratio=ratio, original_tokens=tokens) == budget


def test_bos_counts_against_the_budget_only_when_told():
    assert token_budget(max_tokens=4096, keep_ratio=None, original_tokens=0, bos=1) == 4095


sizes = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 2)), min_size=1, max_size=10)


@st.composite
def problems(draw):
    pairs = draw(sizes)
    alone = [n for n, _ in pairs]
    joined = [n + extra for n, extra in pairs]
    score = st.one_of(st.integers(0, 4).map(float), st.none())
    scores = draw(st.lists(score, min_size=len(pairs), max_size=len(pairs)))
    return scores, alone, joined


def count(kept, alone, joined):
    return sum(joined[i] for i in kept[:-1]) + (alone[kept[-1]] if kept else 0)


def brute_force(scores, alone, joined, budget, min_steps):
    """Recount everything after each removal of the lowest (score, index)."""
    kept = list(range(len(alone)))
    rank = [math.inf if s is None else s for s in scores]
    while count(kept, alone, joined) > budget and len(kept) > min_steps:
        kept.remove(min(kept, key=lambda i: (rank[i], i)))
    return tuple(kept)


@given(problem=problems(), budget=st.integers(-1, 60), min_steps=st.integers(0, 2))
def test_equals_the_recounting_loop(problem, budget, min_steps):
    scores, alone, joined = problem
    choice = remove_lowest(scores, alone, joined, max_tokens=budget, min_steps=min_steps)
    assert choice.kept == brute_force(scores, alone, joined, budget, min_steps)
    assert choice.tokens == count(choice.kept, alone, joined)
    assert choice.over_budget == (choice.tokens > budget)
    assert sorted((*choice.kept, *choice.removed)) == list(range(len(alone)))


@given(problem=problems(), small=st.integers(0, 40), more=st.integers(0, 20))
def test_a_smaller_budget_keeps_a_subset(problem, small, more):
    scores, alone, joined = problem
    tight = remove_lowest(scores, alone, joined, max_tokens=small)
    wide = remove_lowest(scores, alone, joined, max_tokens=small + more)
    assert set(tight.kept) <= set(wide.kept)


@given(problem=problems(), budget=st.integers(0, 60))
def test_refill_stays_within_budget_and_only_adds(problem, budget):
    scores, alone, joined = problem
    plain = remove_lowest(scores, alone, joined, max_tokens=budget)
    refilled = remove_lowest(scores, alone, joined, max_tokens=budget, refill=True)
    assert set(plain.kept) <= set(refilled.kept)
    assert refilled.over_budget or count(refilled.kept, alone, joined) <= budget
    assert refilled.tokens == count(refilled.kept, alone, joined)
