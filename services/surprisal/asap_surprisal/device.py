"""Whether the device still does its work: a lost one answers fast, with errors, and would attract
ever more of it.

Knows times and outcomes, not torch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING

from asap.errors import AsapError, CapacityError
from asap.ports import ScoreRequest
from asap.types import StepScores
from asap_surprisal.batcher import BatchScorer, OverScorer

if TYPE_CHECKING:
    from asap_surprisal.preparation import Prepared

__all__ = ["WatchedScorer"]

FRESH_S = 60.0
"""A forward pass that worked counts for so long."""
STUCK_S = 600.0
"""One that runs counts as work for so long: a large batch on a CPU takes minutes."""
PROBE_S = 10.0
BROKEN_AFTER = 2
"""Texts in a row, each alone on the device, that it failed for or had no memory for: no batch gets
smaller.
"""
PROBE = ScoreRequest("a", ("b",), ("first_token_surprisal",))


class WatchedScorer(OverScorer):
    """A `BatchScorer` with a memory of when its device, or its server, last worked.

    Args:
        scorer: what is watched.
        sure_tokens: what memory was sure to hold when it was free. That a longer text does not fit
            says nothing of the device; None: any text should.
        on_broken: called when single texts are refused `BROKEN_AFTER` times in a row. They have
            been given back, but so will be all that follow: a new process is the way out.
    """

    def __init__(
        self,
        scorer: BatchScorer,
        *,
        sure_tokens: int | None = None,
        on_broken: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(scorer)
        self._sure_tokens, self._on_broken = sure_tokens, on_broken
        self._worked_at = self._refused_at = float("-inf")
        self._refused = 0
        self._failed = False
        self._running: list[float] = []
        self._probe: asyncio.Task[list[StepScores]] | None = None

    def prepare(self, request: ScoreRequest) -> Prepared:
        """The request tokenised, in any thread."""
        return self._scorer.prepare(request)

    async def score_prepared(self, prepared: Sequence[Prepared]) -> list[StepScores]:
        """Scores for each request; what comes of it is remembered.

        Raises CapacityError for texts without any finite score when a small one has none either:
        the device is at fault, not they. Otherwise they are scored as they are, score missing.
        """
        if not any(ready.tokens for ready in prepared):
            # counts alone say nothing of the device
            return await self._scorer.score_prepared(prepared)
        started = monotonic()
        self._running.append(started)
        try:
            results = await self._scorer.score_prepared(prepared)
            if not all(_has_numbers(scores) for scores in results):
                await self._ask()
        except Exception as error:
            self._failed = True
            if isinstance(error, CapacityError):
                self._count_refusal(prepared)
            raise
        finally:
            self._running.remove(started)
        self._refused, self._worked_at, self._failed = 0, monotonic(), False
        return results

    async def _ask(self) -> None:
        """A small text scored now. Raises CapacityError (`not-ready`) when it has no number."""
        [scores] = await self._scorer.score_prepared([self.prepare(PROBE)])
        if not _has_numbers(scores):
            raise CapacityError("the device computes no finite number", code="not-ready")

    def _count_refusal(self, prepared: Sequence[Prepared]) -> None:
        if len(prepared) > 1:  # its texts are tried one by one
            return
        if self._sure_tokens is not None and prepared[0].tokens > self._sure_tokens:
            return
        self._refused, self._refused_at = self._refused + 1, monotonic()
        if self._refused == BROKEN_AFTER:
            self._on_broken()

    async def check(self) -> None:
        """Raise CapacityError (`not-ready`) unless a forward pass of the last minute worked.

        With none at hand a small one is made, at most one at a time, behind the batch that runs.
        After `BROKEN_AFTER` refusals in a row a minute passes before a small one counts.
        """
        now = monotonic()
        if self._refused >= BROKEN_AFTER and now - self._refused_at < FRESH_S:
            raise CapacityError(
                "the device fails, or has too little memory, for any text", code="not-ready"
            )
        works = bool(self._running) and now - self._running[0] < STUCK_S
        if not self._failed and (works or now - self._worked_at < FRESH_S):
            return
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self.score_prepared([self.prepare(PROBE)]))
        await asyncio.wait({self._probe}, timeout=PROBE_S)
        if not self._probe.done():
            raise CapacityError(f"the device gave no answer in {PROBE_S:.0f} s", code="not-ready")
        try:
            self._probe.result()
        except Exception as error:
            detail = error.detail if isinstance(error, AsapError) else "the device fails"
            raise CapacityError(detail, code="not-ready") from error

    async def close(self) -> None:
        """End a check that still runs."""
        if self._probe is not None:
            self._probe.cancel()
            with suppress(Exception, asyncio.CancelledError):
                await self._probe


def _has_numbers(scores: StepScores) -> bool:
    """Whether any value is finite, or none was asked for."""
    values = [value for values in scores.scores.values() for value in values]
    return not values or any(value is not None for value in values)
