from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from asap_gateway.live.think_splitter import ThinkSplitter, split_thinking

PIECES = st.sampled_from(
    ["<think>", "</think>", "<", "</", "</th", "think>", ">", " ", "\n", "a", "step 1.", "é", "🙂"]
)
TEXTS = st.lists(PIECES, max_size=12).map("".join)


@st.composite
def cut_texts(draw):
    """A text and the same in pieces, cut anywhere."""
    text = draw(TEXTS)
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    ends = [0, *places, len(text)]
    return text, [text[a:b] for a, b in pairwise(ends)]


def fed(pieces, opened):
    splitter = ThinkSplitter(opened=opened)
    parts = [*(splitter.feed(piece) for piece in pieces), splitter.finish()]
    return tuple(map("".join, zip(*parts, strict=True)))


@given(cut=cut_texts(), opened=st.booleans())
@example(cut=("a </think> b", list("a </think> b")), opened=True)
def test_how_a_text_is_cut_changes_nothing(cut, opened):
    text, pieces = cut
    assert fed(pieces, opened) == split_thinking(text, opened=opened)


@given(text=TEXTS, opened=st.booleans())
def test_the_parts_are_those_around_the_first_closing_tag(text, opened):
    """Written the short way, which needs the whole text."""
    body, tag = text.lstrip(), text.lstrip().startswith("<think>")
    if not (opened or tag):
        assert split_thinking(text, opened=opened) == ("", text)
        return
    inside = body.removeprefix("<think>").lstrip() if tag else text
    thinking, closed, answer = inside.partition("</think>")
    wanted = (thinking.rstrip(), answer.lstrip()) if closed else (thinking, "")
    assert split_thinking(text, opened=opened) == wanted


@pytest.mark.parametrize("opened", [True, False])
def test_what_is_certain_is_passed_on_at_once(opened):
    splitter = ThinkSplitter(opened=opened)
    splitter.feed("<think>")
    assert splitter.feed("step") == ("step", "")
    assert splitter.feed(" 1 </th") == (" 1", "")
    assert splitter.feed("ink>\n\nyes") == ("", "yes")
    assert splitter.feed(" </think>") == ("", " </think>")
    assert splitter.closed


def test_it_tells_where_it_is():
    splitter = ThinkSplitter(opened=True)
    assert splitter.thinks
    splitter.feed("so</think>")
    assert not splitter.thinks
    assert splitter.closed
    assert not ThinkSplitter(opened=False).thinks


def test_a_text_that_only_looks_like_a_tag_is_text():
    assert split_thinking("if a </thin", opened=True) == ("if a </thin", "")
    assert split_thinking("<th", opened=False) == ("", "<th")
    assert split_thinking("x <think>a</think>b", opened=False) == ("", "x <think>a</think>b")
