"""Calls passed on as they come, to a server that makes its own batches."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from time import perf_counter

from asap.ports import ScoreRequest
from asap.types import StepScores
from asap_runtime.telemetry import SCORE_SECONDS, span
from asap_surprisal.batcher import BatchScorer, OverScorer, Preparer, overloaded

__all__ = ["DirectScorer"]


class DirectScorer(OverScorer):
    """The port `Scorer`, for any number of concurrent callers on one loop.

    Args:
        scorer: holds back what is more than its server may have at once.
        max_inside: texts that are scored or wait; beyond, callers who can come back are refused.
    """

    def __init__(self, scorer: BatchScorer, *, max_inside: int) -> None:
        super().__init__(scorer)
        self._max_inside = max_inside
        self._preparer = Preparer(scorer)
        self._calls: set[asyncio.Task[list[StepScores]]] = set()
        self._inside = 0
        self._seconds = 1.0

    async def stop(self) -> None:
        """End; callers that wait are cancelled, and so are those who come later."""
        self._preparer.stop()
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)

    async def score(self, requests: Sequence[ScoreRequest]) -> list[StepScores]:
        """Scores for each request; a caller that is cancelled takes its requests along."""
        call = asyncio.create_task(self._score(requests))
        self._calls.add(call)
        self._inside += len(requests)
        try:
            return await call
        finally:
            self._calls.discard(call)
            self._inside -= len(requests)

    async def score_or_refuse(self, requests: Sequence[ScoreRequest]) -> list[StepScores]:
        """As `score`. Raises Overloaded with `retry_after_s` when enough texts are inside."""
        if self._inside >= self._max_inside:
            raise overloaded(self._seconds)
        return await self.score(requests)

    async def _score(self, requests: Sequence[ScoreRequest]) -> list[StepScores]:
        prepared = await self._preparer.prepare(requests)
        started = perf_counter()
        with span("score texts", rows=len(prepared), tokens=sum(one.tokens for one in prepared)):
            results = await self._scorer.score_prepared(prepared)
        seconds = perf_counter() - started
        SCORE_SECONDS.labels("forward").observe(seconds)
        self._seconds += (seconds - self._seconds) / 8
        return results
