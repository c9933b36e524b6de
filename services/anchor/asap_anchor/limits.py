"""How hard a server may be asked: calls at once, calls and tokens per minute, and when not at all.

Plain values with the clock as an argument, and `Slots`, their only piece that waits. Times are
seconds of any one clock that never goes back. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Hashable
from statistics import median

__all__ = ["AdaptiveLimit", "Breaker", "Pace", "Slots"]

GROW_AFTER = 50
"""Good answers for one more call at a time; also the fewest that a latency is judged by."""
SLOW = 2.0
"""Latency has clearly risen when the median is so many times the best of the last windows."""
WINDOWS = 10


class AdaptiveLimit:
    """Calls at once: one more per 50 good answers, half on a refusal or clearly rising latency.

    What a server says of calls that began before the last cut is an echo of what is mended already,
    so a burst of refusals halves once.
    """

    def __init__(self, ceiling: int) -> None:
        self.value = ceiling
        self._ceiling = ceiling
        self._good = 0
        self._cut_at = float("-inf")
        self._seconds: dict[Hashable, list[float]] = {}
        self._medians: dict[Hashable, deque[float]] = {}

    def answered(self, kind: Hashable, *, began: float, now: float) -> None:
        """A good answer. `kind` tells questions apart whose answers differ in length."""
        self._good += 1
        if self._good >= GROW_AFTER:
            self._good = 0
            self.value = min(self.value + 1, self._ceiling)
        if began >= self._cut_at:
            self._judge(kind, now - began, now)

    def refused(self, *, began: float, now: float) -> None:
        """The server asks for less: 429 or 503."""
        if began >= self._cut_at:
            self._cut(now)

    def _judge(self, kind: Hashable, seconds: float, now: float) -> None:
        window = self._seconds.setdefault(kind, [])
        window.append(seconds)
        # Of calls that began together the quick ones answer first: a window holds them all.
        if len(window) < max(GROW_AFTER, 2 * self.value):
            return
        latency, best = median(window), self._medians.setdefault(kind, deque(maxlen=WINDOWS))
        window.clear()
        if best and latency > SLOW * min(best):
            self._cut(now)
            # A server that is slow whatever we do must not be asked less and less.
            best.clear()
        best.append(latency)

    def _cut(self, now: float) -> None:
        self.value = max(1, self.value // 2)
        self._good, self._cut_at = 0, now
        self._seconds.clear()


class Pace:
    """Units per minute, evenly spread: no burst, so no minute holds more than its share."""

    def __init__(self, per_minute: float | None) -> None:
        self._seconds = 60.0 / per_minute if per_minute else 0.0
        self._free_at = float("-inf")

    def reserve(self, units: float, now: float) -> float:
        """Seconds to wait before these units may be used."""
        start = max(self._free_at, now)
        self._free_at = start + units * self._seconds
        return start - now

    def correct(self, units: float) -> None:
        """So many units more (or fewer) were used than were reserved."""
        self._free_at += units * self._seconds

    def pause(self, until: float) -> None:
        """Nothing before then: the server named a time."""
        self._free_at = max(self._free_at, until)


class Breaker:
    """Open after 20 calls of which half failed; then one call probes from time to time.

    A refusal for too many calls is no failure here: a limit answers that.
    """

    CALLS, SHARE, OPEN_S, PROBE_S = 20, 0.5, 30.0, 5.0

    def __init__(self, on_change: Callable[[bool], None] = lambda is_open: None) -> None:
        self._on_change = on_change
        self._outcomes: deque[bool] = deque(maxlen=self.CALLS)
        self._open_until: float | None = None
        self._probing = False
        self.reason = ""
        """What the call said that opened it."""

    @property
    def is_open(self) -> bool:
        """Whether calls are refused, the probe aside."""
        return self._open_until is not None

    def wait_s(self, now: float) -> float:
        """Seconds until it is worth coming again; 0: come in, and say `begin`."""
        if self._open_until is None:
            return 0.0
        if self._probing:
            return self.PROBE_S
        return max(0.0, self._open_until - now)

    def begin(self) -> bool:
        """A call starts. True: it is the probe, and its `end` decides."""
        self._probing = self.is_open
        return self._probing

    def end(self, failure: str | None, now: float, *, probe: bool) -> None:
        """A call is over, well or with this failure."""
        if probe and failure is None:
            self._close()
        elif probe:
            self.trip(failure or "", now)
        elif not self.is_open:  # what began before it opened says nothing new
            self._outcomes.append(failure is None)
            failed = self._outcomes.count(False)
            if failure and len(self._outcomes) == self.CALLS and failed >= self.SHARE * self.CALLS:
                self.trip(failure, now)

    def cancelled(self, *, probe: bool) -> None:
        """A call was given up before the server said anything; the next one may probe."""
        if probe:
            self._probing = False

    def trip(self, failure: str, now: float) -> None:
        """Open at once, or stay open: every call would fail."""
        was_open, self.reason = self.is_open, failure
        self._probing = False
        self._open_until = now + self.OPEN_S
        if not was_open:
            self._on_change(True)

    def _close(self) -> None:
        self._open_until, self._probing = None, False
        self._outcomes.clear()
        self._on_change(False)


class Slots:
    """A semaphore of as many slots as an `AdaptiveLimit` allows at this moment; `async with`."""

    def __init__(self, limit: AdaptiveLimit) -> None:
        self._limit = limit
        self._slots = asyncio.Semaphore(limit.value)
        self._size = limit.value
        """Slots that are free or taken; more than allowed only until somebody comes or goes."""

    async def __aenter__(self) -> None:
        await self._slots.acquire()
        while self._size > self._limit.value:  # a slot that the limit has taken away
            self._size -= 1
            await self._slots.acquire()

    async def __aexit__(self, *_: object) -> None:
        if self._size > self._limit.value:
            self._size -= 1
            return
        self._slots.release()
        while self._size < self._limit.value:
            self._size += 1
            self._slots.release()
