from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asap.surprisal import build_context, first_tokens, plan_windows
from strategies import steps as step_lists


def test_raw_context_is_question_think_mark_and_steps():
    context = build_context("Q?", ["one", "two"])
    assert context.text == "Q?\n<think>\none\n\ntwo"
    assert [context.text[a:b] for a, b in zip(context.starts, context.ends, strict=True)] == [
        "one",
        "two",
    ]
    assert context.text[: context.cot_start] == "Q?\n<think>\n"


def test_chat_context_has_the_marks_of_training():
    assert build_context("Q?", ["one"], "chat").text == "<｜User｜>Q?<｜Assistant｜><think>\none"


@given(question=st.text(max_size=10), steps=step_lists)
def test_every_step_stands_where_the_context_says(question, steps):
    context = build_context(question, steps)
    assert [context.text[a:b] for a, b in zip(context.starts, context.ends, strict=True)] == steps


def spans_of(*tokens):
    """Offsets of tokens that follow each other; '' is a special without text."""
    spans, at = [], 0
    for token in tokens:
        spans.append((at, at + len(token)))
        at += len(token)
    return spans


STEPS = "so x\n\nwait"  # starts at 0 and 6


@pytest.mark.parametrize(
    ("tokens", "positions"),
    [
        (["so", " x", "\n\n", "wait"], (0, 3)),  # no BOS: a count of prefix tokens + 1 hits " x"
        (["", "so", " x", "\n\n", "wait"], (1, 4)),  # BOS
        (["", "", "so", " x", "\n\n", "wait"], (2, 5)),  # two specials
        (["", "so", " x", "\n", "\nwa", "it"], (1, 4)),  # the separator merges with the next letter
    ],
)
def test_first_tokens_are_found_by_offsets(tokens, positions):
    found = first_tokens(spans_of(*tokens), (0, 6))
    assert found.positions == positions
    assert found.merged == ((1,) if "\nwa" in tokens else ())


def test_a_character_of_several_tokens_is_scored_by_its_first():
    # 漢 is three byte-level tokens with the same span
    found = first_tokens([(0, 1), (1, 3), (3, 4), (3, 4), (3, 4)], (0, 3))
    assert (found.positions, found.partial) == ((0, 2), (1,))


@pytest.mark.parametrize(
    ("length", "window"), [(10, 10), (11, 10), (40, 10), (1, 4), (5, 1), (23, 7)]
)
def test_windows_score_each_position_once_with_the_longer_left_context(length, window):
    windows = plan_windows(length, window)
    scored = [at for w in windows for at in range(w.score_from, w.stop)]
    assert scored == list(range(length))
    for later in windows[1:]:
        assert later.score_from - later.start >= window - max(window // 2, 1)
        assert later.stop - later.start <= window
