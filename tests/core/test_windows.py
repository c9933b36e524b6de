from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from asap.windows import clip, rough_tokens, split_windows

STEPS = st.lists(st.text(min_size=1, max_size=300), min_size=1, max_size=60)
ROOM = st.integers(20, 400)


def size(steps):
    return sum(rough_tokens(step) + 6 for step in steps)


@given(STEPS, ROOM)
def test_every_step_is_shown_and_each_window_brings_new_ones(steps, room):
    windows = split_windows(steps, room)
    assert sorted({i for window in windows for i in window}) == list(range(len(steps)))
    for before, after in itertools.pairwise(windows):
        assert before.start < after.start <= before.stop < after.stop


@given(STEPS, ROOM)
def test_a_window_of_several_steps_fits_and_so_does_the_overlap(steps, room):
    windows = split_windows(steps, room)
    for window in windows:
        assert len(window) == 1 or size(steps[i] for i in window) <= room
    for before, after in itertools.pairwise(windows):
        assert 8 * size(steps[i] for i in range(after.start, before.stop)) <= room


def test_short_steps_do_overlap():
    windows = split_windows(["word"] * 100, 160)
    assert len(windows) > 5
    assert all(a.stop - b.start == 2 for a, b in itertools.pairwise(windows))


def test_without_a_bound_there_is_one_window():
    assert split_windows(["a"] * 1000, None) == [range(1000)]


@given(st.text(max_size=400), st.integers(2, 60))
def test_a_clipped_text_fits_and_keeps_both_ends(text, room):
    clipped = clip(text, room)
    assert rough_tokens(clipped) <= max(room, 2) + 1
    if rough_tokens(text) <= room:
        assert clipped == text


def test_clipping_keeps_beginning_and_end():
    clipped = clip("begin " + "x" * 900 + " end", 20)
    assert clipped.startswith("begin ")
    assert clipped.endswith(" end")
