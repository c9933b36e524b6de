"""What the work on one claim costs: told by whoever pays, read by the runner.

A stage returns a record or raises, is stopped by a time-out or cancelled: in each case the money is
spent. So the sum lives beside the work and not in its result.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from asap_runtime.values import micro_usd

__all__ = ["Spending", "charged_to", "spend"]


class Spending:
    """Money that was spent and is not booked yet."""

    def __init__(self) -> None:
        self._usd = 0.0

    def add(self, usd: float) -> None:
        """US dollars more."""
        self._usd += usd

    def take(self) -> int:
        """The sum in micro-dollars, which is the caller's to book; the sum starts anew."""
        taken, self._usd = micro_usd(self._usd), 0.0
        return taken


_running: ContextVar[Spending | None] = ContextVar("asap_spending", default=None)


@contextmanager
def charged_to(spending: Spending) -> Iterator[None]:
    """What is spent in this block, and in tasks that it starts, is added to `spending`."""
    token = _running.set(spending)
    try:
        yield
    finally:
        _running.reset(token)


def spend(usd: float) -> None:
    """So many US dollars were paid just now; without effect where nobody adds up."""
    spending = _running.get()
    if spending is not None:
        spending.add(usd)
