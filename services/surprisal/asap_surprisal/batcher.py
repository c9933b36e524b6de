"""Batches over items and jobs: many callers wait, one owner forms batches, the device never waits
for a clock.

In the manner of a token-budget queue: the next batch forms while the device works, so its size
follows the load. It grows until the token sum would pass the budget and stops at the first entry
that does not fit, so nobody starves; an entry that was cancelled leaves. Knows lengths and futures,
not torch.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from asap.ports import Scorer, ScoreRequest
from asap.surprisal import build_context
from asap.types import StepScores
from asap_runtime.telemetry import BATCH_ROWS, BATCH_TOKENS

__all__ = ["BatchingScorer"]


@dataclass(slots=True)
class _Entry:
    request: ScoreRequest
    tokens: int
    result: asyncio.Future[StepScores]


class BatchingScorer:
    """The port `Scorer`, for any number of concurrent callers on one loop.

    An entry longer than the budget is a batch of its own; the scorer behind has windows for it.
    """

    def __init__(self, scorer: Scorer, *, max_batch_tokens: int) -> None:
        self._scorer, self._max_batch_tokens = scorer, max_batch_tokens
        self._waiting: deque[_Entry] = deque()
        self._arrived = asyncio.Event()
        self._owner: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """The scorer's name."""
        return self._scorer.name

    @property
    def tokenizer_name(self) -> str:
        """The scorer's tokenizer."""
        return self._scorer.tokenizer_name

    @property
    def waiting_tokens(self) -> int:
        """Tokens that wait for a batch."""
        return sum(entry.tokens for entry in self._waiting if not entry.result.done())

    def count(self, text: str) -> int:
        """Number of ids of `text`, special tokens not included."""
        return self._scorer.count(text)

    def start(self) -> None:
        """Begin to form batches, on the running loop."""
        self._owner = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End; callers that wait are cancelled."""
        if self._owner is not None:
            self._owner.cancel()
            with suppress(asyncio.CancelledError):
                await self._owner
        for entry in self._waiting:
            entry.result.cancel()
        self._waiting.clear()

    async def score(self, requests: Sequence[ScoreRequest]) -> list[StepScores]:
        """Scores for each request; a caller that is cancelled takes its entries along."""
        loop = asyncio.get_running_loop()
        entries = []
        for request in requests:
            text = build_context(request.question, request.steps, request.context).text
            tokens = await asyncio.to_thread(self._scorer.count, text) if request.scores else 0
            entries.append(_Entry(request, tokens, loop.create_future()))
        self._waiting.extend(entries)
        self._arrived.set()
        try:
            return list(await asyncio.gather(*(entry.result for entry in entries)))
        finally:
            for entry in entries:
                entry.result.cancel()

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            batch = self._next_batch()
            if not batch:
                self._arrived.clear()
                continue
            BATCH_ROWS.observe(len(batch))
            BATCH_TOKENS.observe(sum(entry.tokens for entry in batch))
            try:
                results = await self._scorer.score([entry.request for entry in batch])
            except Exception as error:  # the callers' to handle: each gets it
                for entry in batch:
                    if not entry.result.done():
                        entry.result.set_exception(error)
                continue
            for entry, scores in zip(batch, results, strict=True):
                if not entry.result.done():
                    entry.result.set_result(scores)

    def _next_batch(self) -> list[_Entry]:
        """First come, first served, up to the budget; at least one entry. O(batch)."""
        batch: list[_Entry] = []
        tokens = 0
        while self._waiting:
            entry = self._waiting[0]
            if entry.result.done():
                self._waiting.popleft()
                continue
            if batch and tokens + entry.tokens > self._max_batch_tokens:
                break
            tokens += entry.tokens
            batch.append(self._waiting.popleft())
        return batch
