"""Writes the outcomes of many items in few transactions, and publishes what is due next.

Outcomes that arrive while one transaction runs go into the next one, up to 64: no timer, and under
load the database sees a fiftieth of the writes. Commit first, publish after: a message that is lost
is published again by the sweeper.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from itertools import groupby

from asap_runtime.publisher import Publisher
from asap_runtime.queue import LIVE, TaskQueue
from asap_runtime.store import MAX_BATCH, JobStore
from asap_runtime.sweep import Sweep
from asap_runtime.telemetry import trace_carrier
from asap_runtime.values import Outcome

__all__ = ["Finisher"]


class Finisher:
    """Outcomes of one process's claims, written in the order of their arrival."""

    def __init__(self, store: JobStore, sweep: Sweep, queue: TaskQueue) -> None:
        self._store, self._publisher = store, Publisher(sweep, queue)
        self._waiting: deque[tuple[Outcome, asyncio.Future[bool]]] = deque()
        self._writer: asyncio.Task[None] | None = None

    async def save(self, outcome: Outcome) -> bool:
        """Write the outcome; False when its fence no longer held and nothing was changed."""
        saved: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append((outcome, saved))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write())
        return await saved

    async def _write(self) -> None:
        while self._waiting:
            size = min(MAX_BATCH, len(self._waiting))
            batch = [self._waiting.popleft() for _ in range(size)]
            outcomes = [outcome for outcome, _ in batch]
            try:
                touched = await asyncio.to_thread(self._finish_and_publish, outcomes)
            except Exception as error:  # each caller's to handle
                for _, saved in batch:
                    if not saved.done():
                        saved.set_exception(error)
                continue
            for outcome, saved in batch:
                if not saved.done():
                    saved.set_result(outcome.claim.id in touched)

    def _finish_and_publish(self, outcomes: Sequence[Outcome]) -> set[int]:
        touched = self._store.finish(outcomes)
        moved = [o for o in outcomes if o.next_stage is not None and o.claim.id in touched]
        moved.sort(key=lambda o: (str(o.next_stage), o.claim.priority))
        for (stage, priority), group in groupby(
            moved, key=lambda o: (str(o.next_stage), o.claim.priority)
        ):
            claims = [outcome.claim for outcome in group]
            # What finds no room takes its turn with the sweeper: a fast stage fills no queue.
            room = 0 if priority == LIVE else self._publisher.room(stage)
            due = [claim.due() for claim in claims]
            self._publisher.publish(stage, due, room, trace_carrier(claims[0].trace))
        return touched
