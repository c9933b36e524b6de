"""The sweeper's loop: publishes what is due, in turns and not too much at a time; ends lost leases;
closes finished jobs.

It makes the broker disposable: whatever was lost between commit and publish, or with the broker, is
published again from the rows. Idempotent and bounded, so every replica may run one; one is active.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence

from asap_runtime.logs import get_logger
from asap_runtime.publisher import Publisher
from asap_runtime.queue import MAX_ITEMS, TaskQueue
from asap_runtime.sweep import Sweep
from asap_runtime.telemetry import (
    ITEMS_OPEN,
    LEASES_LOST,
    OLDEST_DUE_SECONDS,
    QUEUE_ITEMS,
    REPUBLISHED,
)

__all__ = ["Sweeper"]

PERIOD_S = 1.0
BUSY_S = 0.05
"""Between passes while items are being published."""
LINGER_S = 1.0
"""How long passes stay close together after the last publication: the job may end now."""
MEASURE_S = 15.0
GAUGES = (QUEUE_ITEMS, ITEMS_OPEN, OLDEST_DUE_SECONDS)
ROWS = 500
"""Rows per kind and pass: the cost of a pass does not grow with the size of a job."""


class Sweeper:
    """One pass a second over the ready index, many while there is something to publish."""

    def __init__(
        self, sweep: Sweep, queue: TaskQueue, stages: Sequence[str], *, period_s: float = PERIOD_S
    ) -> None:
        self._sweep, self._stages, self._period_s = sweep, stages, period_s
        self._publisher = Publisher(sweep, queue)
        self._bell, self._stopped = threading.Event(), False
        self._busy_until = self._tidy_at = self._measure_at = 0.0
        self._log = get_logger()

    async def run(self) -> None:
        """Sweep in a thread until cancelled; trouble with the database is logged and tried again.

        A thread of its own: on a busy loop the executor's threads are what claims wait for.
        """
        thread = threading.Thread(target=self._live, name="sweeper", daemon=True)
        thread.start()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self._stopped = True
            self._bell.set()
            await asyncio.to_thread(thread.join)

    def wake(self) -> None:
        """Look now, not at the next second: there are new items. From any thread, never waits."""
        self._bell.set()

    def sweep(self) -> bool:
        """One pass; whether the next one should come soon."""
        now = time.monotonic()
        published = sum([self._publish_due(stage) for stage in self._stages])
        if published:
            self._busy_until = now + LINGER_S
        more = self._sweep.finish_jobs(ROWS) == ROWS
        if now >= self._tidy_at:
            more = self._tidy() or more
            self._tidy_at = now + (0.0 if more else self._period_s)
        if now >= self._measure_at:
            self._measure()
            self._measure_at = now + MEASURE_S
        return more or now < self._busy_until

    def _live(self) -> None:
        while not self._stopped:
            try:
                self._lead()
            except Exception:
                self._log.exception("sweep.failed")
                self._forget()
            self._pause(self._period_s)

    def _lead(self) -> None:
        """Sweep, if no other process does, for as long as there is something to do."""
        with self._sweep.active() as mine:
            if not mine:
                self._forget()
            while mine and self.sweep() and not self._stopped:
                self._pause(BUSY_S)

    def _pause(self, seconds: float) -> None:
        self._bell.wait(seconds)
        if not self._stopped:
            self._bell.clear()

    def _publish_due(self, stage: str) -> int:
        room = self._publisher.room(stage)
        # With a full window, too, there may be live items, which come first.
        due = self._sweep.due(stage, max(room, MAX_ITEMS))
        published = self._publisher.publish(stage, due, room)
        REPUBLISHED.labels(stage).inc(published)
        return published

    def _tidy(self) -> bool:
        """End what nobody else will end; whether there is more of it."""
        ended = self._sweep.end_items(ROWS)
        lost = self._sweep.expire_leases(ROWS)
        for stage, count in lost.stages.items():
            LEASES_LOST.labels(stage).inc(count)
        return ROWS in (ended, lost.requeued + lost.failed)

    def _forget(self) -> None:
        """No figures, rather than old ones: another process leads and has them, or nobody can."""
        self._measure_at = 0.0
        for gauge in GAUGES:
            gauge.clear()

    def _measure(self) -> None:
        for stage in self._stages:
            backlog = self._sweep.backlog(stage)
            QUEUE_ITEMS.labels(stage).set(backlog.due + backlog.running)
            ITEMS_OPEN.labels(stage, "queued").set(backlog.due)
            ITEMS_OPEN.labels(stage, "running").set(backlog.running)
            OLDEST_DUE_SECONDS.labels(stage).set(backlog.oldest_due_s)
