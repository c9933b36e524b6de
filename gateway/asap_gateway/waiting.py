"""The bounded waits of POST /prune: one look at the database for all of them, every few
milliseconds.

A poll for each waiter would be a load that grows with the callers, and a slower one a delay that
each of them feels.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from asap.errors import AsapError
from asap_runtime.ledger import JobLedger
from asap_runtime.views import Result

__all__ = ["Waits"]

PERIOD_S = 0.005


class Waits:
    """Requests that wait for the only item of their job.

    Args:
        ledger: where results are read.
        limit: concurrent waits; beyond it there is no waiting.
    """

    def __init__(self, ledger: JobLedger, limit: int) -> None:
        self._ledger, self._limit = ledger, limit
        self._waiting: dict[str, tuple[str, asyncio.Future[Result]]] = {}
        self._poller: asyncio.Task[None] | None = None
        self._stopped = False

    async def result(self, tenant: str, job_id: str, seconds: float) -> Result | None:
        """How the job's first item ended, or None when that is not known in time."""
        if self._stopped or len(self._waiting) >= self._limit:
            return None
        ended: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting[job_id] = (tenant, ended)
        if self._poller is None or self._poller.done():
            self._poller = asyncio.create_task(self._poll())
        try:
            async with asyncio.timeout(seconds):
                return await ended
        except TimeoutError:
            return None
        finally:
            self._waiting.pop(job_id, None)

    def stop(self) -> None:
        """The server is leaving: whoever waits is answered now, with the job's address."""
        self._stopped = True
        for _, ended in self._waiting.values():
            if not ended.done():
                ended.set_exception(TimeoutError())

    async def _poll(self) -> None:
        while self._waiting:
            wanted = {job_id: tenant for job_id, (tenant, _) in self._waiting.items()}
            with suppress(AsapError):  # the database is away: the waits end by their time
                found = await asyncio.to_thread(self._ledger.single_results, wanted)
                for job_id, result in found.items():
                    waiting = self._waiting.get(job_id)
                    if waiting is not None and not waiting[1].done():
                        waiting[1].set_result(result)
            await asyncio.sleep(PERIOD_S)
