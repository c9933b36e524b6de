"""How fast a backlog shrinks, and so when a refused caller should come again."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import pairwise

__all__ = ["DrainRate"]

SEEN_S = 60.0
"""How far back it looks."""
SHORTEST_S, LONGEST_S = 1.0, 300.0
UNKNOWN_S = 30.0
"""The advice while nothing was seen to leave yet."""
JITTER = 0.25
"""Callers that were refused together come again spread over a quarter of the time."""


class DrainRate:
    """Sizes of a backlog as they are seen, whoever adds to it. Thread-safe.

    Only what leaves is counted: new jobs come in leaps, between two looks at most, and in overload,
    when the answer matters, nothing comes in.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()
        self._lock = threading.Lock()

    def observe(self, backlog: int) -> None:
        """Note how many items are open now."""
        now = self._clock()
        with self._lock:
            self._seen.append((now, backlog))
            while self._seen[0][0] < now - SEEN_S:
                self._seen.popleft()

    def items_per_s(self) -> float:
        """What left per second over the last minute; 0 while unknown."""
        with self._lock:
            seen = list(self._seen)
        if len(seen) < 2 or seen[-1][0] == seen[0][0]:
            return 0.0
        left = sum(max(0, before - after) for (_, before), (_, after) in pairwise(seen))
        return left / (seen[-1][0] - seen[0][0])

    def retry_after_s(self, excess: int) -> float:
        """Seconds until so many items have left, from 1 to 300, with jitter."""
        rate = self.items_per_s()
        seconds = excess / rate if rate else UNKNOWN_S
        spread = seconds * random.uniform(1.0, 1.0 + JITTER)
        return min(LONGEST_S, max(SHORTEST_S, spread))
