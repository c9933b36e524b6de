"""Steps: blocks of a CoT between blank lines. Split, join, and nothing about their meaning.

`join(steps)` is the steps joined by one blank line. Laws (tested): `split(join(split(x))) ==
split(x)`, no step is empty, and no step of the `safe` split holds a blank line outside a closed
fence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal

from asap.codesplit import merge_code
from asap.fences import find_fences

__all__ = ["SEPARATOR", "Split", "join_steps", "split_steps"]

Split = Literal["paper", "safe", "code"]
SEPARATOR = "\n\n"

# NBSP is not a blank: a line of it is text that somebody wrote.
_BLANK_LINE = re.compile(r"[ \t]*")


def split_steps(cot: str, split: Split = "safe") -> list[str]:
    r"""The steps of `cot` in order. O(characters).

    `paper` (§3.3, SplitStepsByBlankLine): strip, split at every "\n\n", strip each, drop empty
    ones; it loses indentation and cuts fenced code. `safe`: split at runs of blank lines, never
    inside a closed fence, keeping the first line's indent. `code`: `safe`, then blocks of one
    unfenced piece of code are joined again (see `codesplit`).
    """
    return _SPLITTERS[split](cot)


def join_steps(steps: Sequence[str]) -> str:
    """The CoT made of these steps: one blank line between two."""
    return SEPARATOR.join(steps)


def _split_paper(cot: str) -> list[str]:
    return [piece.strip() for piece in cot.strip().split(SEPARATOR) if piece.strip()]


def _split_safe(cot: str) -> list[str]:
    lines = cot.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    inside = [False] * len(lines)
    for fence in find_fences(lines):
        inside[fence.start : fence.end + 1] = [True] * (fence.end + 1 - fence.start)
    steps: list[str] = []
    block: list[str] = []
    for line, in_fence in zip([*lines, ""], [*inside, False], strict=True):
        if in_fence or not _BLANK_LINE.fullmatch(line):
            block.append(line)
        elif block:
            steps.append("\n".join(block).rstrip(" \t"))
            block = []
    return steps


def _split_code(cot: str) -> list[str]:
    return merge_code(_split_safe(cot), SEPARATOR)


_SPLITTERS: dict[Split, Callable[[str], list[str]]] = {
    "paper": _split_paper,
    "safe": _split_safe,
    "code": _split_code,
}
