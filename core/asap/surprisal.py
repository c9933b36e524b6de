"""Stage 2, the method's heart: where each step's first token stands in the scored context (§3.3).

The surprisal of a step is -ln p(first token | question, earlier steps). This module builds the
context, finds the first tokens by character offsets and plans windows for texts longer than the
model; the forward pass itself belongs to a Scorer.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from asap.steps import SEPARATOR, join_steps

__all__ = ["Context", "FirstTokens", "Window", "build_context", "first_tokens", "plan_windows"]


@dataclass(frozen=True, slots=True)
class Context:
    """The scored text and where things stand in it (code-point offsets). BOS is not part of the
    text.
    """

    text: str
    cot_start: int
    starts: tuple[int, ...]
    """Offset of each step's first character."""
    ends: tuple[int, ...]
    """Offset behind each step's last character; the separator is not included."""


@dataclass(frozen=True, slots=True)
class FirstTokens:
    """Index of each step's first token, and the steps whose token is special."""

    positions: tuple[int, ...]
    """The number of tokens for a step that the tokenizer drops and nothing follows."""
    merged: tuple[int, ...]
    """Steps whose first token starts before the step: it merged with the separator."""
    partial: tuple[int, ...]
    """Steps whose first character spans several tokens; the first of them is scored."""


@dataclass(frozen=True, slots=True)
class Window:
    """One forward pass over tokens [start, stop); it scores the positions in [score_from, stop)."""

    start: int
    stop: int
    score_from: int


def build_context(
    question: str, steps: Sequence[str], context: Literal["raw", "chat"] = "raw"
) -> Context:
    """X = Q, `<think>`, the steps. `raw` has no chat marks (as scored by the authors); `chat` is
    the form that the model is trained and run in. O(characters).
    """
    if context == "chat":
        prefix = f"<｜User｜>{question}<｜Assistant｜><think>\n"
    else:
        prefix = f"{question}\n<think>\n"
    starts, ends, at = [], [], len(prefix)
    for step in steps:
        starts.append(at)
        ends.append(at + len(step))
        at += len(step) + len(SEPARATOR)
    return Context(prefix + join_steps(steps), len(prefix), tuple(starts), tuple(ends))


def first_tokens(spans: Sequence[tuple[int, int]], starts: Sequence[int]) -> FirstTokens:
    """For each step start, the lowest token index whose span ends behind it. O(tokens + P log
    tokens).

    Offsets, not counts of prefix tokens: the count is wrong without BOS, with two specials, and
    where a tokenizer merges the separator with the next letter.

    Args:
        spans: (start, end) of each token in the text; specials have an empty span.
        starts: offset of each step's first character, increasing.
    """
    ends: list[
        int
    ] = []  # made non-decreasing, so that empty spans of specials do not break the search
    for _, end in spans:
        ends.append(max(end, ends[-1]) if ends else end)
    positions, merged, partial = [], [], []
    for step, start in enumerate(starts):
        at = bisect_right(ends, start)
        positions.append(at)
        if at < len(spans) and spans[at][0] < start:
            merged.append(step)
        if at + 1 < len(spans) and spans[at + 1][0] < spans[at][1]:
            partial.append(step)
    return FirstTokens(tuple(positions), tuple(merged), tuple(partial))


def plan_windows(length: int, window: int) -> list[Window]:
    """Windows of `window` tokens with stride window/2 that score each position once, each from the
    window that gives it the longer left context. One window when the text fits.
    """
    if length <= window:
        return [Window(0, length, 0)]
    stride = max(window // 2, 1)
    windows = [Window(0, window, 0)]
    while windows[-1].stop < length:
        last = windows[-1]
        start = last.start + stride
        windows.append(Window(start, min(start + window, length), last.stop))
    return windows
