"""Live before batch within one process: while somebody waits for an answer, batch items pause.

Slots keep batch items from taking a live one's place; here it is about the loop and the processor,
of which a burst of short batch items leaves a live one a sixty-fourth.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ["Precedence"]

PATIENCE_S = 0.25
"""So long a batch item waits, at most: live callers without a pause slow a job, never stop it."""
LINGER_S = 0.15
"""Live work goes on elsewhere when it leaves this process, and comes back: stay quiet so long."""


class Precedence:
    """Shared by all that works on one loop. Lives on that loop's thread."""

    def __init__(self) -> None:
        self._live = 0
        self._alone = asyncio.Event()
        self._alone.set()

    @contextmanager
    def live(self) -> Iterator[None]:
        """Somebody waits for what happens in the block."""
        self._live += 1
        self._alone.clear()
        try:
            yield
        finally:
            asyncio.get_running_loop().call_later(LINGER_S, self._leave)

    def _leave(self) -> None:
        self._live -= 1
        if not self._live:
            self._alone.set()

    async def give_way(self) -> None:
        """Let live work pass first."""
        if self._live:
            with suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE_S):
                    await self._alone.wait()
