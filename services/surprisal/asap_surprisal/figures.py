"""What the device has done, as metrics: tokens, steps, operations, and the peak to compare with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from asap_runtime.telemetry import (
    SCORE_BUSY_SECONDS,
    SCORE_OPERATIONS,
    SCORE_PASSES,
    SCORE_PEAK_RATE,
    SCORE_ROWS,
    SCORE_STEPS,
    SCORE_TOKENS,
)

if TYPE_CHECKING:  # the metering needs torch
    from asap_surprisal.metering import ScorerTotals

__all__ = ["Figures", "Metered"]


class Metered(Protocol):
    """A scorer that counts what its device does."""

    @property
    def totals(self) -> ScorerTotals:
        """What the device has done so far."""

    def peak_rate(self) -> float:
        """Operations per second of a large matrix product, measured now."""


class Figures:
    """Shows one scorer. Measures its device's peak, so make it before there is work: that takes
    1 s on two CPU cores.
    """

    def __init__(self, scorer: Metered) -> None:
        self._scorer, self._shown = scorer, scorer.totals
        SCORE_PEAK_RATE.set(scorer.peak_rate())

    def update(self) -> None:
        """Count what was done since the last time."""
        before, now = self._shown, self._scorer.totals
        self._shown = now
        SCORE_TOKENS.labels("run").inc(now.tokens - before.tokens)
        SCORE_TOKENS.labels("reused").inc(now.tokens_reused - before.tokens_reused)
        SCORE_ROWS.inc(now.rows - before.rows)
        SCORE_PASSES.inc(now.passes - before.passes)
        SCORE_STEPS.inc(now.steps - before.steps)
        SCORE_BUSY_SECONDS.inc(now.busy_s - before.busy_s)
        SCORE_OPERATIONS.inc(now.operations - before.operations)
