"""Runs stages and the sweeper on one loop, whatever is behind store and queue."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Self
from uuid import uuid4

from asap_runtime.database import Database, open_engine
from asap_runtime.migrate import upgrade
from asap_runtime.queue import TaskQueue, open_queue
from asap_runtime.settings import RuntimeSettings
from asap_runtime.stage import RunnerLimits, Stage, StageRunner
from asap_runtime.store import JobStore
from asap_runtime.sweep import Sweep
from asap_runtime.sweeper import Sweeper

__all__ = ["StageHost", "open_database"]

STAGE_NAMES = ("anchor", "surprisal")
POLL_S = 5.0
"""How often a worker looks for work itself while the broker does not answer."""


def open_database(settings: RuntimeSettings) -> Database:
    """The database of the settings, at the newest schema; makes the home folder of SQLite."""
    url = settings.database_url
    if url.startswith("sqlite:///"):
        settings.home.expanduser().mkdir(parents=True, exist_ok=True)
    upgrade(url)
    return Database(open_engine(url))


class StageHost:
    """Started stages that take items from the queue until the block ends.

    `async with` starts every stage and the sweeper; leaving it stops claiming, gives leases back
    and lets go of engines and connections.
    """

    def __init__(
        self,
        database: Database,
        queue: TaskQueue,
        stages: Sequence[Stage],
        *,
        limits: RunnerLimits | None = None,
        sweep_period_s: float = 1.0,
    ) -> None:
        self.queue, self._stages, self._limits = queue, stages, limits
        self._store, self._sweep = JobStore(database), Sweep(database)
        self._sweeper = Sweeper(self._sweep, queue, STAGE_NAMES, period_s=sweep_period_s)
        self._owner = f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}"
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    def open(cls, settings: RuntimeSettings, database: Database, stages: Sequence[Stage]) -> Self:
        """A host on the queue of the settings."""
        return cls(database, open_queue(settings.queue_url), stages)

    async def __aenter__(self) -> Self:
        for stage in self._stages:
            await stage.start()
            runner = StageRunner(
                stage, self._store, self._sweep, self.queue, owner=self._owner, limits=self._limits
            )
            self.queue.consume(stage.name, runner.run, concurrency=stage.concurrency)
            self._tasks.append(asyncio.create_task(runner.poll(POLL_S)))
        self._tasks.append(asyncio.create_task(self._sweeper.run()))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await self.queue.drain()
        for stage in self._stages:
            await stage.stop()
        self.queue.close()
