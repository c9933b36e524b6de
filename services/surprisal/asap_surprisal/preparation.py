"""A request made ready for a model, and the model's values made ready for the core.

Everything that needs the tokenizer happens in `prepare`, before and beside the work of the device;
`step_scores` is arithmetic. Every scorer uses both, so all of them score the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from statistics import fmean

from asap.config import ScoreName
from asap.ports import ScoreRequest
from asap.steps import SEPARATOR, join_steps
from asap.surprisal import build_context
from asap.types import StepScores
from asap_surprisal.sequence import SequencePlan, plan_sequence
from asap_surprisal.tokenization import HFTokenCounter

__all__ = ["Prepared", "Values", "prepare", "step_scores"]

_EVERY_TOKEN: frozenset[ScoreName] = frozenset({"mean_surprisal", "step_entropy"})
_DECIMALS = 6  # of a score: what selection sees is exactly what the JSON line holds

Values = Mapping[int, tuple[float, float]]
"""(surprisal, entropy) in nats by token index."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """One request with its tokens."""

    request: ScoreRequest
    plan: SequencePlan
    counts: StepScores
    """The answer but for its scores."""

    @property
    def tokens(self) -> int:
        """Tokens that a model must run, windows included; 0 when counts are enough."""
        return sum(len(row.ids) for row in self.plan.rows)


def prepare(request: ScoreRequest, counter: HFTokenCounter, window: int) -> Prepared:
    """Tokenise, find each step's tokens, plan windows of `window` tokens, count. Any thread."""
    plan = SequencePlan([], [range(0)] * len(request.steps), ())
    if request.scores and request.steps:
        context = build_context(request.question, request.steps, request.context)
        encoding = counter.encode(context.text)
        plan = plan_sequence(
            encoding.ids,
            encoding.offsets,
            context,
            bos_id=counter.bos_id,
            window=window,
            every_token=not _EVERY_TOKEN.isdisjoint(request.scores),
        )
    return Prepared(request, plan, _count(request, plan, counter))


def step_scores(prepared: Prepared, values: Values) -> StepScores:
    """The answer to the request."""
    scores = {
        score: tuple(_step_score(score, step, values) for step in prepared.plan.steps)
        for score in prepared.request.scores
    }
    return prepared.counts.model_copy(update={"scores": scores})


def _count(request: ScoreRequest, plan: SequencePlan, counter: HFTokenCounter) -> StepScores:
    steps = request.steps
    counts = counter.count_all([join_steps(steps), *steps, *(step + SEPARATOR for step in steps)])
    total, tokens, joined = counts[0], counts[1 : len(steps) + 1], counts[len(steps) + 1 :]
    flags = list(plan.flags)
    if sum(chain(joined[:-1], tokens[-1:])) != total:
        flags.append("counts_not_additive")
    return StepScores(
        scores={},
        tokens=tuple(tokens),
        tokens_joined=tuple(joined),
        total=total,
        bos=int(counter.bos_id is not None),
        flags=tuple(flags),
    )


def _step_score(score: ScoreName, step: range, values: Values) -> float | None:
    """The step's score; None where a token has no finite value, so that the step is kept."""
    tokens = step if score in _EVERY_TOKEN else step[:1]
    column = 0 if score in ("first_token_surprisal", "mean_surprisal") else 1
    found = [values[token][column] for token in tokens if token in values]
    if not found or len(found) < len(tokens):
        return None
    mean = fmean(found)
    return (
        round(mean, _DECIMALS) + 0.0 if math.isfinite(mean) else None
    )  # + 0.0 turns -0.0 into 0.0
