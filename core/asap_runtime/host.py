"""Runs stages and the sweeper on one loop, whatever is behind store and queue."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any, Literal, Self
from uuid import uuid4

from asap.errors import UpstreamUnavailable
from asap_runtime.brokers import open_queue
from asap_runtime.database import Database, open_engine
from asap_runtime.migrate import has_schema, upgrade
from asap_runtime.precedence import Precedence
from asap_runtime.queue import TaskQueue
from asap_runtime.reconciling import reconcile
from asap_runtime.settings import RuntimeSettings
from asap_runtime.stage import RunnerLimits, Stage, StageRunner
from asap_runtime.store import JobStore
from asap_runtime.sweep import Sweep
from asap_runtime.sweeper import Sweeper

__all__ = ["StageHost", "open_database"]

STAGE_NAMES = ("anchor", "surprisal", "trainer", "generate", "grade")
POLL_S = 5.0
"""How often a worker looks for work itself while the broker does not answer."""


def open_database(settings: RuntimeSettings, *, migrate: bool = False) -> Database:
    """The database of the settings, with the schema that this code needs.

    A file of SQLite is one machine's own: it is made, and brought to the newest schema, on the way.
    A server is shared, by processes of two releases during an update: its schema changes when
    somebody says so, by `migrate`. Raises UpstreamUnavailable (`not-ready`) for an old schema.
    """
    url = settings.database_url
    database = Database(open_engine(url))
    if database.is_sqlite:
        settings.home.expanduser().mkdir(parents=True, exist_ok=True)
    if migrate or database.is_sqlite:
        upgrade(url)
    elif not has_schema(database.engine):
        database.close()
        raise UpstreamUnavailable(
            "the database has not the schema that this release needs; `asap db upgrade` makes it",
            code="not-ready",
        )
    return database


class StageHost:
    """Started stages that take items from the queue until the block ends.

    `async with` starts every stage and the sweeper; leaving it stops claiming, gives leases back
    and lets go of engines and connections. `chores` are loops that run beside the stages.
    """

    def __init__(
        self,
        database: Database,
        queue: TaskQueue,
        stages: Sequence[Stage[Any]],
        *,
        chores: Sequence[Callable[[], Coroutine[None, None, None]]] = (),
        limits: RunnerLimits | None = None,
        sweep_period_s: float = 1.0,
    ) -> None:
        self.database, self.queue, self.stages = database, queue, tuple(stages)
        self.phase: Literal["starting", "running", "draining"] = "starting"
        self.precedence = Precedence()
        self._chores, self._limits = chores, limits
        self._store, self._sweep = JobStore(database), Sweep(database)
        self._sweeper = Sweeper(self._sweep, queue, STAGE_NAMES, period_s=sweep_period_s)
        self._owner = f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}"
        self._leaving = AsyncExitStack()

    @classmethod
    def open(
        cls,
        settings: RuntimeSettings,
        database: Database,
        stages: Sequence[Stage[Any]],
        chores: Sequence[Callable[[], Coroutine[None, None, None]]] = (),
    ) -> Self:
        """A host on the queue of the settings."""
        return cls(database, open_queue(settings.queue_url), stages, chores=chores)

    async def __aenter__(self) -> Self:
        # Whatever ends the start, what was started before is stopped, in the opposite order.
        async with AsyncExitStack() as started:
            started.callback(self.queue.close)
            for stage in self.stages:
                await stage.start()
                started.push_async_callback(stage.stop)
            started.push_async_callback(self.queue.drain)
            for stage in self.stages:
                runner = self._runner(stage)
                self.queue.consume(stage.name, runner.run, concurrency=stage.concurrency)
                started.push_async_callback(_end, asyncio.create_task(runner.poll(POLL_S)))
            for chore in (self._sweeper.run, self._reconcile, *self._chores):
                started.push_async_callback(_end, asyncio.create_task(chore()))
            self._leaving = started.pop_all()
        self.phase = "running"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.phase = "draining"
        await self._leaving.aclose()

    def wake(self) -> None:
        """There are new items: the sweeper looks now, not at the next second. From any thread."""
        self._sweeper.wake()

    async def _reconcile(self) -> None:
        await reconcile(self.database, self.stages)

    def _runner(self, stage: Stage[Any]) -> StageRunner:
        return StageRunner(
            stage,
            self._store,
            self._sweep,
            self.queue,
            owner=self._owner,
            limits=self._limits,
            precedence=self.precedence,
        )


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
