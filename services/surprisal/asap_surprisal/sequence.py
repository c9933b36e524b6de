"""From one request to the rows that a forward pass must give: tokens, positions and windows.

Pure arithmetic on token ids and character spans; knows neither torch nor batches.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from asap.surprisal import Context, first_tokens, plan_windows

__all__ = ["Row", "SequencePlan", "plan_sequence"]


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a batch: token ids of one window, and the positions whose next token is scored."""

    ids: list[int]
    positions: list[int]
    """Indices into `ids`, increasing; the distribution behind each is needed."""
    targets: list[int]
    """The token that really follows each position."""
    tokens: list[int]
    """Where each target stands in the whole sequence."""


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """What one CoT needs."""

    rows: list[Row]
    steps: list[range]
    """Tokens of each step in the whole sequence, separators left out; empty for a step without."""
    flags: tuple[str, ...]


def plan_sequence(
    ids: Sequence[int],
    spans: Sequence[tuple[int, int]],
    context: Context,
    *,
    bos_id: int | None,
    window: int,
    every_token: bool,
) -> SequencePlan:
    """The rows that score the steps of `context`.

    A sequence longer than the window loses the start of its question first; where the CoT alone
    does not fit, windows of stride window/2 give each token the longer left context.

    Args:
        ids: tokens of `context.text`, without BOS.
        spans: (start, end) of each token in the text, in code points.
        context: the scored text; it has at least one step.
        bos_id: put in front; None for a tokenizer without BOS.
        window: longest input of the model, in tokens.
        every_token: score all tokens of each step, or the first alone.
    """
    flags = []
    first = first_tokens(spans, context.starts)
    specials = [] if bos_id is None else [bos_id]
    sequence, shift = [*specials, *ids], len(specials)
    windows = plan_windows(len(sequence), window)
    if len(windows) > 1:
        cot_tokens = len(ids) - first.positions[0]
        if cot_tokens + 1 <= window:  # one token of left context, BOS or the question's last
            dropped = len(sequence) - window
            sequence = [*specials, *ids[dropped:]]
            shift -= dropped
            windows = plan_windows(len(sequence), window)
            flags.append("question_truncated")
        else:
            flags.append("windowed")
    if first.merged:
        flags.append("merged_boundary")
    if first.partial:
        flags.append("partial_first_token")
    token_starts = list(accumulate((start for start, _ in spans), max))
    steps = [
        range(at + shift, max(bisect_left(token_starts, end), at) + shift)
        for at, end in zip(first.positions, context.ends, strict=True)
    ]
    wanted = sorted({token for step in steps for token in (step if every_token else step[:1])})
    if wanted and wanted[0] == 0:
        flags.append("no_left_context")
    rows = []
    for part in windows:
        tokens = [token for token in wanted if max(part.score_from, 1) <= token < part.stop]
        if tokens:
            rows.append(
                Row(
                    ids=sequence[part.start : tokens[-1]],  # what follows cannot change the scores
                    positions=[token - 1 - part.start for token in tokens],
                    targets=[sequence[token] for token in tokens],
                    tokens=tokens,
                )
            )
    return SequencePlan(rows, steps, tuple(flags))
