"""Batches over items and jobs: many callers wait, one owner forms batches, the device never waits
for a clock.

In the manner of a token-budget queue: the next batch forms while the device works, so its size
follows the load. It grows until the token sum would pass the budget and stops at the first entry
that does not fit, so nobody starves; an entry that was cancelled leaves. Knows lengths and futures,
not torch.
"""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter

from asap.errors import InvalidInput, Overloaded
from asap.ports import Scorer, ScoreRequest
from asap.surprisal import build_context
from asap.types import StepScores
from asap_runtime.telemetry import (
    BATCH_ROWS,
    BATCH_TOKENS,
    SCORE_SECONDS,
    span,
    trace_context,
)

__all__ = ["BatchingScorer"]

QUEUE_BATCHES = 2
"""Batches that may wait: one to follow the running one at once, one to choose from."""
LONGEST_RETRY_S = 300.0


@dataclass(slots=True, eq=False)
class _Entry:
    request: ScoreRequest
    tokens: int
    result: asyncio.Future[StepScores]
    trace: dict[str, str] = field(default_factory=trace_context)
    arrived_at: float = field(default_factory=perf_counter)


class BatchingScorer:
    """The port `Scorer`, for any number of concurrent callers on one loop.

    An entry longer than the budget is a batch of its own; the scorer behind has windows for it.
    """

    def __init__(self, scorer: Scorer, *, max_batch_tokens: int) -> None:
        self._scorer, self.max_batch_tokens = scorer, max_batch_tokens
        self.max_waiting_tokens = QUEUE_BATCHES * max_batch_tokens
        self._waiting: OrderedDict[_Entry, None] = OrderedDict()
        self._waiting_tokens = 0
        self._tokens_per_s = float(max_batch_tokens)
        self._door = asyncio.Lock()
        self._room, self._arrived = asyncio.Event(), asyncio.Event()
        self._owner: asyncio.Task[None] | None = None
        self._stopped = False

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
        """Tokens that wait for a batch. O(1)."""
        return self._waiting_tokens

    def count(self, text: str) -> int:
        """Number of ids of `text`, special tokens not included."""
        return self._scorer.count(text)

    def start(self) -> None:
        """Begin to form batches, on the running loop."""
        self._owner = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End; callers that wait are cancelled, and so are those who come later."""
        self._stopped = True
        if self._owner is not None:
            self._owner.cancel()
            with suppress(asyncio.CancelledError):
                await self._owner
        for entry in list(self._waiting):
            self._leave(entry)

    async def score(self, requests: Sequence[ScoreRequest]) -> list[StepScores]:
        """Scores for each request; a caller that is cancelled takes its entries along.

        Waits at the door, first come first served, while `max_waiting_tokens` are inside: a stage
        whose slots all stand there claims nothing more.
        """
        entries = await self._tokenized(requests)
        try:
            for entry in entries:
                async with self._door:
                    while self._waiting and self._is_beyond(entry.tokens):
                        self._room.clear()
                        await self._room.wait()
                    self._enter(entry)
            return list(await asyncio.gather(*(entry.result for entry in entries)))
        finally:
            for entry in entries:
                self._leave(entry)

    async def score_or_refuse(self, requests: Sequence[ScoreRequest]) -> list[StepScores]:
        """As `score`, for callers who can come back: they never wait at the door.

        Raises Overloaded with `retry_after_s` when the queue is full, and InvalidInput
        (`text-too-long`) for what it would never take.
        """
        self._refuse_when_full()
        entries = await self._tokenized(requests)
        if any(entry.tokens > self.max_batch_tokens for entry in entries):
            raise InvalidInput(
                f"a text has more than {self.max_batch_tokens} tokens", code="text-too-long"
            )
        if sum(entry.tokens for entry in entries) > self.max_waiting_tokens:
            raise InvalidInput(
                f"the texts have more than {self.max_waiting_tokens} tokens in sum; send fewer",
                code="text-too-long",
            )
        self._refuse_when_full()
        try:
            for entry in entries:
                self._enter(entry)
            return list(await asyncio.gather(*(entry.result for entry in entries)))
        finally:
            for entry in entries:
                self._leave(entry)

    async def _tokenized(self, requests: Sequence[ScoreRequest]) -> list[_Entry]:
        loop, entries = asyncio.get_running_loop(), []
        for request in requests:
            text = build_context(request.question, request.steps, request.context).text
            with SCORE_SECONDS.labels("tokenize").time():
                tokens = await asyncio.to_thread(self.count, text) if request.scores else 0
            entries.append(_Entry(request, tokens, loop.create_future()))
        return entries

    def _is_beyond(self, tokens: int) -> bool:
        return self._waiting_tokens + tokens > self.max_waiting_tokens

    def _refuse_when_full(self) -> None:
        if self._waiting_tokens > self.max_waiting_tokens:
            seconds = min(LONGEST_RETRY_S, max(1.0, self._waiting_tokens / self._tokens_per_s))
            raise Overloaded(
                "too many texts wait to be scored",
                retry_after_s=round(seconds * random.uniform(1.0, 1.2), 1),
            )

    def _enter(self, entry: _Entry) -> None:
        if self._stopped:
            entry.result.cancel()
            return
        self._waiting[entry] = None
        self._waiting_tokens += entry.tokens
        self._arrived.set()

    def _leave(self, entry: _Entry) -> None:
        if entry in self._waiting:
            self._forget(entry)
        entry.result.cancel()

    def _forget(self, entry: _Entry) -> None:
        del self._waiting[entry]
        self._waiting_tokens -= entry.tokens
        self._room.set()

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            batch = self._next_batch()
            if not batch:
                self._arrived.clear()
                continue
            try:
                results = await self._score(batch)
                for entry, scores in zip(batch, results, strict=True):
                    if not entry.result.done():
                        entry.result.set_result(scores)
            except Exception as error:  # the callers' to handle: each gets it
                for entry in batch:
                    if not entry.result.done():
                        entry.result.set_exception(error)
            finally:  # whoever has heard nothing never will
                for entry in batch:
                    entry.result.cancel()

    def _next_batch(self) -> list[_Entry]:
        """First come, first served, up to the budget; at least one entry. O(batch)."""
        batch: list[_Entry] = []
        tokens = 0
        while self._waiting:
            entry = next(iter(self._waiting))
            if batch and tokens + entry.tokens > self.max_batch_tokens:
                break
            tokens += entry.tokens
            self._forget(entry)
            batch.append(entry)
        return batch

    async def _score(self, batch: Sequence[_Entry]) -> list[StepScores]:
        started, tokens = perf_counter(), sum(entry.tokens for entry in batch)
        BATCH_ROWS.observe(len(batch))
        BATCH_TOKENS.observe(tokens)
        for entry in batch:
            SCORE_SECONDS.labels("queue").observe(started - entry.arrived_at)
        # One batch serves many items: it is a child of the first, and names the others.
        links = [entry.trace for entry in batch[1:]]
        with span("score batch", batch[0].trace, links=links, rows=len(batch), tokens=tokens):
            results = await self._scorer.score([entry.request for entry in batch])
        seconds = perf_counter() - started
        SCORE_SECONDS.labels("forward").observe(seconds)
        self._tokens_per_s += (max(tokens, 1) / max(seconds, 1e-6) - self._tokens_per_s) / 8
        return results
