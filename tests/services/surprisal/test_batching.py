"""Batches of rows under a budget of tokens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from asap_surprisal.batching import plan_batches


def test_longest_first_and_gaps_are_filled():
    assert plan_batches([3, 500, 20, 100, 90, 7, 100], 200) == [[1], [3, 6], [4, 2, 5, 0]]
    assert plan_batches([], 200) == []


@given(lengths=st.lists(st.integers(0, 300)), most=st.integers(1, 400))
def test_every_row_once_within_the_budget(lengths, most):
    batches = plan_batches(lengths, most)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or sum(lengths[i] for i in batch) <= most
