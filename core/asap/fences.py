"""Fenced code blocks, by lines. Knows Markdown fences only, nothing of steps or answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Fence", "code_blocks", "find_fences", "unwrap", "wrap"]

# An opening line: optional indent, a run of three or more backticks or tildes, an info string. As
# in CommonMark the info string of a backtick fence holds no backtick, so "```x```" in prose opens
# nothing.
_OPEN = re.compile(r"^[ \t]*(?P<run>`{3,}(?=[^`]*$)|~{3,})(?P<info>.*)$")
_CLOSE = re.compile(r"^[ \t]*(?P<run>`{3,}|~{3,})[ \t]*$")
_BACKTICKS = re.compile(r"`{3,}")

PYTHON_INFO = frozenset({"", "python", "py", "python3"})


@dataclass(frozen=True, slots=True)
class Fence:
    """One closed fence: line numbers of its opening and closing line, and its info string."""

    start: int
    end: int
    info: str


def find_fences(lines: Sequence[str]) -> list[Fence]:
    """Closed fences in order, never nested; an unclosed opening line is ordinary text. O(lines)."""
    # longest_after[c][i]: longest closing run of character c at or after line i. It tells at once
    # that an opening line has no partner, which keeps a text of many unclosed fences linear.
    longest_after = {"`": [0] * (len(lines) + 1), "~": [0] * (len(lines) + 1)}
    for i in range(len(lines) - 1, -1, -1):
        for char, longest in longest_after.items():
            longest[i] = longest[i + 1]
            if (close := _CLOSE.match(lines[i])) and close["run"][0] == char:
                longest[i] = max(longest[i], len(close["run"]))
    fences: list[Fence] = []
    i = 0
    while i < len(lines):
        opening = _OPEN.match(lines[i])
        if opening and longest_after[opening["run"][0]][i + 1] >= len(opening["run"]):
            end = next(j for j in range(i + 1, len(lines)) if _closes(lines[j], opening["run"]))
            fences.append(Fence(i, end, opening["info"].strip()))
            i = end
        i += 1
    return fences


def _closes(line: str, run: str) -> bool:
    close = _CLOSE.match(line)
    return close is not None and close["run"][0] == run[0] and len(close["run"]) >= len(run)


def code_blocks(text: str, infos: frozenset[str] = PYTHON_INFO) -> list[str]:
    """Bodies of the fenced blocks whose info string (first word, any case) is in `infos`.

    The opening line's indent is removed from the body, so a block inside a list stays valid code.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    blocks = []
    for fence in find_fences(lines):
        info = fence.info.split()[0].lower() if fence.info else ""
        if info in infos:
            indent = len(lines[fence.start]) - len(lines[fence.start].lstrip(" \t"))
            body = lines[fence.start + 1 : fence.end]
            blocks.append("\n".join(_dedent(line, indent) for line in body))
    return blocks


def _dedent(line: str, indent: int) -> str:
    return line[indent:] if not line[:indent].strip() else line.lstrip(" \t")


def wrap(text: str, info: str = "") -> str:
    """`text` inside a fence one backtick longer than any run inside it (minimum 3)."""
    longest = max((len(run) for run in _BACKTICKS.findall(text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{info}\n{text}\n{fence}"


def unwrap(text: str) -> str:
    """The inside of a text that is one fenced block as a whole, else the text; stripped of blank
    edges.
    """
    lines = text.strip().split("\n")
    fences = find_fences(lines)
    if len(fences) == 1 and (fences[0].start, fences[0].end) == (0, len(lines) - 1):
        lines = lines[1:-1]
    return "\n".join(lines).strip()
