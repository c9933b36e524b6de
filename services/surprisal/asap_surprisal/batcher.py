"""Batches over items and jobs: many callers wait, one owner forms batches, the device never waits
for a clock.

In the manner of a token-budget queue: the next batch forms while the device works, so its size
follows the load. It grows until the token sum would pass the budget and stops at the first entry
that does not fit, so nobody starves; an entry that was cancelled leaves. Two batches are with the
scorer at a time: one runs, the other is queued behind it. Knows lengths and futures, not torch.
"""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

from asap.config import ScoreName
from asap.errors import CapacityError, InvalidInput, Overloaded
from asap.ports import ScoreRequest
from asap.types import StepScores
from asap_runtime.telemetry import BATCH_ROWS, BATCH_TOKENS, SCORE_SECONDS, span, trace_context

if TYPE_CHECKING:  # tokenizers are an extra, and the command line imports this without it
    from asap_surprisal.preparation import Prepared

__all__ = ["BatchScorer", "BatchingScorer", "OverScorer", "Preparer", "overloaded"]

QUEUE_BATCHES = 2
"""Batches that may wait: one to follow the running ones at once, one to choose from."""
BATCHES_IN_FLIGHT = 2
"""One on the device, one behind it, so that the device never waits for the loop."""
TEXT_THREADS = 4
LONGEST_RETRY_S = 300.0


class BatchScorer(Protocol):
    """A scorer in two halves: `prepare` needs the tokenizer alone, `score_prepared` the device."""

    @property
    def name(self) -> str:
        """Model name or directory, for provenance."""

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer wherever a count is shown."""

    @property
    def offers(self) -> frozenset[ScoreName]:
        """The scores that it can give."""

    def count(self, text: str) -> int:
        """Number of ids of `text`, special tokens not included."""

    def prepare(self, request: ScoreRequest) -> Prepared:
        """The request tokenised, in any thread. Raises InvalidInput for what is not offered."""

    async def score_prepared(self, prepared: Sequence[Prepared]) -> list[StepScores]:
        """Scores for each request, in order."""


class OverScorer:
    """What stands over a scorer and answers for it: its name, its tokenizer, what it offers."""

    def __init__(self, scorer: BatchScorer) -> None:
        self._scorer = scorer

    @property
    def name(self) -> str:
        """The scorer's name."""
        return self._scorer.name

    @property
    def tokenizer_name(self) -> str:
        """The scorer's tokenizer."""
        return self._scorer.tokenizer_name

    @property
    def offers(self) -> frozenset[ScoreName]:
        """The scores that it can give."""
        return self._scorer.offers

    def count(self, text: str) -> int:
        """Number of ids of `text`, special tokens not included."""
        return self._scorer.count(text)


class Preparer:
    """Tokenises in threads of its own: those of the loop also wait for the database."""

    def __init__(self, scorer: BatchScorer) -> None:
        self._scorer, self._stopped = scorer, False
        self._threads = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="surprisal-prepare")

    async def prepare(self, requests: Sequence[ScoreRequest]) -> list[Prepared]:
        """Each request tokenised, in order; cancelled once it is stopped."""
        loop, prepared = asyncio.get_running_loop(), []
        for request in requests:
            if self._stopped:
                raise asyncio.CancelledError
            with SCORE_SECONDS.labels("tokenize").time():
                ready = await loop.run_in_executor(self._threads, self._scorer.prepare, request)
            prepared.append(ready)
        return prepared

    def stop(self) -> None:
        """Let the threads end."""
        self._stopped = True
        self._threads.shutdown(wait=False, cancel_futures=True)


def overloaded(seconds: float) -> Overloaded:
    """The refusal when what waits takes `seconds`; callers come back at different times."""
    seconds = min(LONGEST_RETRY_S, max(1.0, seconds))
    return Overloaded(
        "too many texts wait to be scored",
        retry_after_s=round(seconds * random.uniform(1.0, 1.2), 1),
    )


@dataclass(slots=True, eq=False)
class _Entry:
    prepared: Prepared
    tokens: int
    result: asyncio.Future[StepScores]
    trace: dict[str, str] = field(default_factory=trace_context)
    arrived_at: float = field(default_factory=perf_counter)


class BatchingScorer(OverScorer):
    """The port `Scorer`, for any number of concurrent callers on one loop.

    Args:
        scorer: what scores a batch.
        max_batch_tokens: of one batch; an entry that is longer is a batch of its own.
        max_text_tokens: longest text to admit from callers who can be refused; None: any.
        after_batch: called when a batch was scored.
    """

    def __init__(
        self,
        scorer: BatchScorer,
        *,
        max_batch_tokens: int,
        max_text_tokens: int | None = None,
        after_batch: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(scorer)
        self._max_text_tokens = max_text_tokens
        self._after_batch = after_batch
        self.max_batch_tokens = max_batch_tokens
        self.max_waiting_tokens = QUEUE_BATCHES * max_batch_tokens
        self._waiting: OrderedDict[_Entry, None] = OrderedDict()
        self._waiting_tokens = 0
        self._overtook = 0
        self._tokens_per_s = float(max_batch_tokens)
        self._answered_at = 0.0
        self._door = asyncio.Lock()
        self._room, self._arrived = asyncio.Event(), asyncio.Event()
        self._free = asyncio.Semaphore(BATCHES_IN_FLIGHT)
        self._preparer = Preparer(scorer)
        self._owner: asyncio.Task[None] | None = None
        self._stopped = False

    @property
    def waiting_tokens(self) -> int:
        """Tokens that wait for a batch. O(1)."""
        return self._waiting_tokens

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
        self._preparer.stop()

    async def score(self, requests: Sequence[ScoreRequest]) -> list[StepScores]:
        """Scores for each request; a caller that is cancelled takes its entries along.

        Waits at the door, first come first served, while `max_waiting_tokens` are inside: a stage
        whose slots all stand there claims nothing more. Callers who can be refused do not stand
        there; the first at the door goes in, room or not, once so many tokens went past it.
        """
        entries = await self._tokenized(requests)
        try:
            for entry in entries:
                async with self._door:
                    self._overtook = 0
                    while self._must_wait(entry):
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
        longest = self._max_text_tokens
        if longest is not None and any(entry.tokens > longest for entry in entries):
            raise InvalidInput(f"a text has more than {longest} tokens", code="text-too-long")
        if len(entries) > 1 and sum(entry.tokens for entry in entries) > self.max_waiting_tokens:
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
        loop = asyncio.get_running_loop()
        prepared = await self._preparer.prepare(requests)
        return [_Entry(ready, ready.tokens, loop.create_future()) for ready in prepared]

    def _must_wait(self, entry: _Entry) -> bool:
        """Whether the first at the door stays there: not for ever, whoever else keeps coming."""
        is_full = self._waiting_tokens + entry.tokens > self.max_waiting_tokens
        return bool(self._waiting) and is_full and self._overtook <= self.max_waiting_tokens

    def _refuse_when_full(self) -> None:
        if self._waiting_tokens > self.max_waiting_tokens:
            raise overloaded(self._waiting_tokens / self._tokens_per_s)

    def _enter(self, entry: _Entry) -> None:
        if self._stopped:
            entry.result.cancel()
            return
        self._waiting[entry] = None
        self._waiting_tokens += entry.tokens
        self._overtook += entry.tokens
        self._arrived.set()
        if self._overtook > self.max_waiting_tokens:
            self._room.set()

    def _leave(self, entry: _Entry) -> None:
        if entry in self._waiting:
            self._forget(entry)
        entry.result.cancel()

    def _forget(self, entry: _Entry) -> None:
        del self._waiting[entry]
        self._waiting_tokens -= entry.tokens
        self._room.set()

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as in_flight:
            while True:
                await self._arrived.wait()
                await self._free.acquire()  # the batch grows until there is a place for it
                if batch := self._next_batch():
                    in_flight.create_task(self._answer(batch))
                else:
                    self._free.release()
                    self._arrived.clear()

    async def _answer(self, batch: Sequence[_Entry]) -> None:
        try:
            await self._score_each(batch)
        finally:
            self._free.release()
            for entry in batch:  # whoever has heard nothing never will
                entry.result.cancel()

    async def _score_each(self, batch: Sequence[_Entry]) -> None:
        """Scores or an error for every entry; a lack of memory is told to those who cause it."""
        try:
            results = await self._score(batch)
        except CapacityError as error:
            if len(batch) > 1:
                for entry in batch:
                    if not entry.result.done():
                        await self._score_each([entry])
            else:
                _fail(batch, error)
        except Exception as error:  # the callers' to handle: each gets it
            _fail(batch, error)
        else:
            for entry, scores in zip(batch, results, strict=True):
                if not entry.result.done():
                    entry.result.set_result(scores)

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
            results = await self._scorer.score_prepared([entry.prepared for entry in batch])
        answered = perf_counter()
        # The batch before this one had the device first.
        seconds = answered - max(started, self._answered_at)
        self._answered_at = answered
        SCORE_SECONDS.labels("forward").observe(seconds)
        self._tokens_per_s += (max(tokens, 1) / max(seconds, 1e-6) - self._tokens_per_s) / 8
        self._after_batch()
        return results


def _fail(batch: Sequence[_Entry], error: Exception) -> None:
    for entry in batch:
        if not entry.result.done():
            entry.result.set_exception(error)
