"""The sweeper's loop: publishes what is due and not under way, ends lost leases, closes finished
jobs.

It makes the broker disposable: whatever was lost between commit and publish, or with the broker, is
published again from the rows. Idempotent and bounded, so every replica may run one; one is active.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import groupby

from asap_runtime.queue import MAX_ITEMS, Message, TaskQueue
from asap_runtime.sweep import Sweep
from asap_runtime.telemetry import QUEUE_ITEMS, REPUBLISHED, get_logger

__all__ = ["Sweeper"]

PERIOD_S = 1.0
ROWS = 500
"""Rows per kind and pass: the cost of a pass does not grow with the size of a job."""


class Sweeper:
    """One pass a second over the ready index, more while a pass is full."""

    def __init__(
        self, sweep: Sweep, queue: TaskQueue, stages: Sequence[str], *, period_s: float = PERIOD_S
    ) -> None:
        self._sweep, self._queue, self._stages, self._period_s = sweep, queue, stages, period_s
        self._log = get_logger()

    async def run(self) -> None:
        """Sweep until cancelled; trouble with the database is logged and tried again."""
        while True:
            full = False
            try:
                full = await asyncio.to_thread(self.sweep)
            except Exception:
                self._log.exception("sweep.failed")
            await asyncio.sleep(0 if full else self._period_s)

    def sweep(self) -> bool:
        """One pass, if no other process is sweeping; whether there is more to publish."""
        with self._sweep.active() as mine:
            if not mine:
                return False
            self._sweep.end_items(ROWS)
            self._sweep.expire_leases(ROWS)
            full = [self._publish_due(stage) for stage in self._stages]
            for stage in self._stages:
                backlog = self._sweep.backlog(stage)
                QUEUE_ITEMS.labels(stage).set(backlog.due + backlog.running)
            self._sweep.finish_jobs(ROWS)
            return any(full)

    def _publish_due(self, stage: str) -> bool:
        due = self._sweep.due(stage, ROWS)
        for priority, group in groupby(due, key=lambda item: item.priority):
            rows = list(group)
            for start in range(0, len(rows), MAX_ITEMS):
                part = rows[start : start + MAX_ITEMS]
                ids = tuple(str(item.id) for item in part)
                if not self._queue.publish(Message(stage, ids, priority)):
                    return False  # full, or gone: the rows wait for the next pass
                self._sweep.mark_published(part)
                REPUBLISHED.labels(stage).inc(len(part))
        return len(due) == ROWS
