"""Stage 1 without an LLM: rank steps against the answer, keep the best. Ours, NOT from the paper.

It serves demos, tests and places without an LLM. Deterministic: no model, no randomness. A step's
relevance is the mean weight of its distinct words that also stand in the answer, where a word
weighs more the fewer steps hold it; names in the answer's code count double. It loses for opening
with a reflection cue ("Wait", "Alternatively") and for repeating an earlier step. Steps are kept by
relevance, earlier first, until they hold the wanted share of the CoT's words.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from asap.fences import code_blocks

__all__ = ["REFLECTION_CUES", "rank_steps", "select_steps"]

REFLECTION_CUES: tuple[str, ...] = (
    "wait",
    "hmm",
    "alternatively",
    "but wait",
    "let me double-check",
    "let me check again",
    "let me verify",
    "actually",
    "hold on",
    "maybe i",
    "no,",
    "oh,",
)
"""Openings of steps that tend to leave the line of reasoning; lower case."""

_WORD = re.compile(r"\w+")
_CUE_PENALTY = 0.5
_REPEAT_PENALTY = 0.9


def rank_steps(steps: Sequence[str], answer: str) -> list[float]:
    """Relevance of each step to `answer`, higher is better. O(words)."""
    bags = [set(_words(step)) for step in steps]
    spread = Counter(word for bag in bags for word in bag)
    in_code = set(_words("\n".join(code_blocks(answer))))
    in_answer = set(_words(answer))
    seen: set[str] = set()
    relevance = []
    for step, bag in zip(steps, bags, strict=True):
        weight = sum(
            (2.0 if word in in_code else 1.0) * math.log1p(len(steps) / spread[word])
            for word in sorted(bag & in_answer)  # sorted: float sums must not depend on set order
        )
        score = weight / math.sqrt(len(bag)) if bag else 0.0
        normal = " ".join(_words(step))
        if step.lstrip().lower().startswith(REFLECTION_CUES):
            score *= 1 - _CUE_PENALTY
        if normal in seen:
            score *= 1 - _REPEAT_PENALTY
        seen.add(normal)
        relevance.append(score)
    return relevance


def select_steps(steps: Sequence[str], answer: str, keep: float) -> tuple[int, ...]:
    """Indices of the most relevant steps that together hold the share `keep` of the words; at least
    one.
    """
    relevance = rank_steps(steps, answer)
    sizes = [len(_words(step)) for step in steps]
    wanted = keep * sum(sizes)
    kept: list[int] = []
    held = 0
    for i in sorted(range(len(steps)), key=lambda i: (-relevance[i], i)):
        if kept and held >= wanted:
            break
        kept.append(i)
        held += sizes[i]
    return tuple(sorted(kept))


def _words(text: str) -> list[str]:
    return [match.group().lower() for match in _WORD.finditer(text)]
