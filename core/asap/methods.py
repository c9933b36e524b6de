"""The one table of pruning methods: name, kind, which stages a record visits, and how steps are
ranked.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from asap.errors import InvalidInput
from asap.types import Record, StepScores

__all__ = ["METHODS", "Method", "Stage", "get_method"]

Stage = Literal["anchor", "surprisal"]
Importance = Callable[[Record, StepScores], Sequence[float | None]]


@dataclass(frozen=True, slots=True)
class Method:
    """A row: the stages of the route, and the importance of each step for the removal engine."""

    name: str
    kind: Literal["composite", "selector", "rewriter", "passthrough"]
    stages: tuple[Stage, ...]
    summary: str
    importance: Importance | None = None
    needs_scores: bool = False
    """Whether ranking needs a forward pass, or token counts are enough."""


def _by_score(record: Record, scored: StepScores) -> Sequence[float | None]:
    return scored.scores[record.config.score]


def _by_chance(record: Record, scored: StepScores) -> Sequence[float]:
    ranks = list(range(len(scored.tokens)))
    random.Random(f"{record.config.seed}:{record.triple.id}").shuffle(ranks)
    return ranks


def _by_position(record: Record, scored: StepScores) -> Sequence[float]:
    return range(len(scored.tokens), 0, -1)


_ROWS = (
    Method(
        "asap",
        "composite",
        ("anchor", "surprisal"),
        "anchor-guided pruning, then first-token surprisal (the paper's method)",
        _by_score,
        needs_scores=True,
    ),
    Method("asap_stage1", "selector", ("anchor",), "anchor-guided pruning alone (w/o fine)"),
    Method(
        "asap_stage2",
        "selector",
        ("surprisal",),
        "first-token surprisal alone (w/o coarse)",
        _by_score,
        needs_scores=True,
    ),
    Method("direct", "rewriter", ("anchor",), "the direct CoT itself"),
    Method("random", "selector", ("surprisal",), "random steps at the same budget", _by_chance),
    Method("truncate", "selector", ("surprisal",), "the first steps that fit", _by_position),
    Method("original", "passthrough", (), "the CoT as it is"),
)
METHODS: dict[str, Method] = {row.name: row for row in _ROWS}


def get_method(name: str) -> Method:
    """The row of that name, or InvalidInput with the nearest known one."""
    if name in METHODS:
        return METHODS[name]
    near = get_close_matches(name, METHODS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise InvalidInput(
        f"unknown method {name!r}; {hint}known: {', '.join(METHODS)}", code="unknown-method"
    )
