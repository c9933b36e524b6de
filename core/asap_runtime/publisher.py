"""Names due items to the queue, a window of them at a time; the one way from rows to messages.

What is not published yet still takes turns, costs the broker nothing and is lost with nobody. So
of the items that can wait, only as many are handed over as the workers take soon.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from asap_runtime.queue import LIVE, MAX_ITEMS, Message, TaskQueue
from asap_runtime.sweep import Sweep
from asap_runtime.values import Due

__all__ = ["Publisher"]

WINDOW = 1000
"""Items of a stage that wait in the queue, at most, while few are running."""
PER_SLOT = 4
"""Items that may wait in the queue for each one that is running, if that is more."""


class Publisher:
    """Publishes and remembers it. Blocking on the database, never on the broker; thread-safe."""

    def __init__(self, sweep: Sweep, queue: TaskQueue) -> None:
        self._sweep, self._queue = sweep, queue

    def room(self, stage: str) -> int:
        """How many more items of the stage may wait in the queue."""
        load = self._sweep.load(stage)
        messages = self._queue.pending(stage)
        # Rows know which items were published, the queue knows which messages are still there: a
        # broker that comes back empty has room again at once.
        waiting = load.published if messages is None else min(load.published, messages * MAX_ITEMS)
        return max(0, max(WINDOW, PER_SLOT * load.running) - waiting)

    def publish(
        self, stage: str, due: Sequence[Due], room: int, trace: Mapping[str, str] | None = None
    ) -> int:
        """Publish `due`, which is in claim order; how many. The others wait for the next sweep.

        Live items are published whatever waits; `room`, from the method of that name, is for the
        others.
        """
        published: list[Due] = []
        for priority, group in groupby(due, key=lambda item: item.priority):
            rows = list(group)
            if priority != LIVE:
                rows = rows[: max(0, room - len(published))]
            for start in range(0, len(rows), MAX_ITEMS):
                part = rows[start : start + MAX_ITEMS]
                ids = tuple(str(item.id) for item in part)
                if not self._queue.publish(Message(stage, ids, priority, dict(trace or {}))):
                    break  # full, or gone
                published += part
        self._sweep.mark_published(published)
        return len(published)
