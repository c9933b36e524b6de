"""The flow of triples through both stages in one process: stage 1 ahead, stage 2 in batches, order
kept.

Stage 1 waits for a server, stage 2 for a device, so the calls for the next chunks are under way
while one chunk is scored. Chunks are cut by position, not by arrival: equal inputs make equal
batches.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

from asap.coarse import coarse_prune
from asap.config import PruneConfig
from asap.errors import AsapError, CoarseExhausted, InvalidInput
from asap.fine import count_tokens, fine_prune
from asap.methods import get_method
from asap.ports import ChatModel, Scorer, TokenCounter
from asap.types import Record, Triple

__all__ = ["Outcome", "prune", "prune_stream"]

CHUNK = 16
"""Records scored together."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the record at `position`: the pruned record, or why there is none."""

    position: int
    record: Record | None
    error: AsapError | None = None


async def prune(
    triples: Iterable[Triple],
    config: PruneConfig,
    *,
    chat: ChatModel | None = None,
    scorer: Scorer | None = None,
) -> list[Record]:
    """Prune a list of triples; the first error is raised. The ten-line door of the library."""
    records = (Record(triple=triple, config=config) for triple in triples)
    done: list[Record] = []
    async for outcome in prune_stream(records, chat=chat, scorer=scorer):
        if outcome.error is not None:
            raise outcome.error
        assert outcome.record is not None
        done.append(outcome.record)
    return done


async def prune_stream(
    records: Iterable[Record],
    *,
    chat: ChatModel | None,
    scorer: Scorer | None,
    counter: TokenCounter | None = None,
    concurrency: int = 32,
) -> AsyncIterator[Outcome]:
    """Outcomes in input order, as soon as each chunk is through.

    An error that belongs to one record (bad input, a refused prompt) is its outcome; one that would
    meet every record (server gone, device out of memory) is raised, with all running calls
    cancelled.

    Args:
        records: read lazily, two chunks more than stage 1 can work on.
        chat: needed by methods that visit the anchor stage, unless the anchor is extractive.
        scorer: needed by methods that visit the surprisal stage.
        counter: counts tokens for methods without a scorer; default: the scorer.
        concurrency: records in stage 1 at the same time, each with one call in flight.
    """
    counter = counter or scorer
    chunks, slots = _chunks(records), asyncio.Semaphore(concurrency)
    ahead = concurrency // CHUNK + 2
    running: deque[tuple[int, list[asyncio.Task[Record]]]] = deque()
    position = 0
    try:
        while True:
            for chunk in islice(chunks, ahead - len(running)):
                tasks = [asyncio.create_task(_first_stage(record, chat, slots)) for record in chunk]
                running.append((position, tasks))
                position += len(chunk)
            if not running:
                return
            start, tasks = running.popleft()
            try:
                outcomes = await _collect(start, tasks)
            finally:
                await _cancel(tasks)
            for outcome in await _second_stage(outcomes, scorer, counter):
                yield outcome
    finally:
        for _, tasks in running:
            await _cancel(tasks)


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    source = iter(records)
    while chunk := list(islice(source, CHUNK)):
        yield chunk


async def _first_stage(record: Record, chat: ChatModel | None, slots: asyncio.Semaphore) -> Record:
    if "anchor" not in get_method(record.config.method).stages:
        return record
    async with slots:
        return await coarse_prune(record, chat)


async def _collect(start: int, tasks: Sequence[asyncio.Task[Record]]) -> list[Outcome]:
    outcomes = []
    for position, task in enumerate(tasks, start):
        try:
            record = await task
        except AsapError as error:
            if error.retryable or error.context.get("status") in (401, 403, 404):
                raise
            outcomes.append(Outcome(position, None, error))
            continue
        if record.coarse is not None and record.coarse.status == "rejected":
            attempts = sum(attempt.purpose == "coarse" for attempt in record.coarse.attempts)
            exhausted = CoarseExhausted(
                f"no valid coarse CoT in {attempts} attempts (on_fail=drop)"
            )
            outcomes.append(Outcome(position, record, exhausted))
        else:
            outcomes.append(Outcome(position, record))
    return outcomes


async def _second_stage(
    outcomes: Sequence[Outcome], scorer: Scorer | None, counter: TokenCounter | None
) -> list[Outcome]:
    done = {outcome.position: outcome for outcome in outcomes}
    through = [o for o in outcomes if o.record is not None and o.error is None]
    to_score = [o for o in through if _needs_scorer(o.record)]
    if to_score:
        if scorer is None:
            raise InvalidInput("this method ranks steps: it needs a scorer")
        scored = await fine_prune([o.record for o in to_score if o.record], scorer)
        done |= {
            o.position: Outcome(o.position, record)
            for o, record in zip(to_score, scored, strict=True)
        }
    if counter is not None:
        for outcome in through:
            if outcome.record is not None and not _needs_scorer(outcome.record):
                record = count_tokens(outcome.record, counter)
                done[outcome.position] = Outcome(outcome.position, record)
    return [done[position] for position in sorted(done)]


def _needs_scorer(record: Record | None) -> bool:
    return record is not None and "surprisal" in get_method(record.config.method).stages


async def _cancel(tasks: Sequence[asyncio.Task[Record]]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError, AsapError):
            await task
