from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from asap.extractive import rank_steps, select_steps
from strategies import steps as step_lists

ANSWER = "Use a heap.\n```python\ndef smallest(xs):\n    return heapq.nsmallest(1, xs)\n```"


def test_steps_that_share_words_with_the_answer_rank_first():
    ranks = rank_steps(["The weather is fine.", "heapq.nsmallest gives the smallest of xs"], ANSWER)
    assert ranks[1] > ranks[0] == 0.0


def test_reflection_cues_and_repetitions_lose():
    plain, cued, repeated = rank_steps(
        ["use nsmallest", "Wait, use nsmallest", "use nsmallest"], ANSWER
    )
    assert plain > cued > 0
    assert repeated < cued


@given(steps=step_lists, keep=st.floats(0.01, 1))
def test_keeps_at_least_one_step_and_the_wanted_share_of_words(steps, keep):
    kept = select_steps(steps, "a b c 01", keep)
    assert kept == tuple(sorted(set(kept)))
    assert kept
    assert set(select_steps(steps, "a b c 01", keep / 2)) <= set(kept)
