"""Evaluation items on their way through the stages of a server, all at once, in this process.

Each step is written to the run's folder. Trouble that may pass is tried again; what one task cannot
be asked for ends that task, and all else ends the run.
"""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack

from pydantic import JsonValue
from rich.console import Console

from asap.errors import AsapError, InvalidInput
from asap.eval_items import EvalItem
from asap_cli.answers import FINAL, Job, StageCount
from asap_cli.eval_folder import EvalFolder, Task, task_of
from asap_cli.watch import JobProgress
from asap_evaluator.stage import GradeStage
from asap_runtime.stage import Done, Stage

__all__ = ["Steps"]

TRIES = 4
"""Of one step of one task, where the trouble may pass."""
PAUSE_S = 2.0
"""After the first of them; it doubles. A server that says how long is given that."""
SHOW_S = 0.5


class Steps:
    """Items on their way through the stages, all at once, each step written down."""

    def __init__(self, folder: EvalFolder, stages: Sequence[Stage[EvalItem]]) -> None:
        self._folder, self.stages = folder, stages
        self._at: dict[Task, tuple[str, str]] = {}
        """Stage and status of each task."""
        self.problems: dict[str, list[str]] = {}
        """Why single tasks could not be asked or graded: sentences by code."""

    async def follow(
        self, items: Sequence[EvalItem], grade: GradeStage, facts: dict[str, JsonValue]
    ) -> None:
        """Until all items are through. `facts` gets those of the sandbox.

        Raises what would end every other item as well: no sandbox, no vLLM, no such model.
        """
        stop = asyncio.current_task()
        assert stop is not None, "this is a coroutine"
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.cancel)
        async with AsyncExitStack() as stack:
            for stage in reversed(self.stages):  # no model is loaded where nothing can be graded
                stack.push_async_callback(stage.stop)
                await stage.start()
            await grade.ready()
            facts["sandbox"] = dict[str, JsonValue](grade.facts)
            with JobProgress(Console(stderr=True), [stage.name for stage in self.stages]) as bars:
                showing = asyncio.create_task(self._show(bars, len(items)))
                stack.callback(showing.cancel)
                await self._all(items)
                bars.show(self._state(len(items)))

    async def _all(self, items: Iterable[EvalItem]) -> None:
        slots = {stage.name: asyncio.Semaphore(stage.concurrency) for stage in self.stages}
        try:
            async with asyncio.TaskGroup() as group:
                for item in items:
                    self._at[task_of(item)] = (self.stages[0].name, "queued")
                    group.create_task(self._one(item, slots))
        except* AsapError as errors:
            raise _first(errors) from None

    async def _one(self, item: EvalItem, slots: Mapping[str, asyncio.Semaphore]) -> None:
        task = task_of(item)
        try:
            for stage in self.stages:
                self._at[task] = (stage.name, "queued")
                async with slots[stage.name]:
                    item = await self._through(stage, item)
            self._at[task] = (self.stages[-1].name, "succeeded")
        except InvalidInput as error:
            self._at[task] = (self._at[task][0], "failed")
            said = f"{item.problems[0].task_id}: {error.detail}"
            self.problems.setdefault(error.problem_code, []).append(said)

    async def _through(self, stage: Stage[EvalItem], item: EvalItem) -> EvalItem:
        """The item behind the stage; each part of the way is written down."""
        tries = 0
        while True:
            try:
                step = await stage.process(item)
            except AsapError as error:
                tries += 1
                if not error.retryable or tries == TRIES:
                    raise
                wait = error.context.get("retry_after_s")
                pause_s = PAUSE_S * 2 ** (tries - 1)
                await asyncio.sleep(float(wait) if isinstance(wait, int | float) else pause_s)
                continue
            tries = 0
            if step.payload != item:
                item = step.payload
                await asyncio.to_thread(self._folder.put, item)
            if isinstance(step, Done):
                return item
            await asyncio.sleep(step.seconds)

    async def _show(self, bars: JobProgress, total: int) -> None:
        while True:
            bars.show(self._state(total))
            await asyncio.sleep(SHOW_S)

    def _state(self, total: int) -> Job:
        """The run as a server would tell of it."""
        at = Counter(self._at.values())
        ended = sum(count for (_, status), count in at.items() if status in FINAL)
        return Job(
            id="local",
            kind="evaluate",
            phase="done" if ended == total else "running",
            created_at=0.0,
            finished_at=None,
            total=total,
            counts=tuple(
                StageCount(stage=stage, status=status, items=count)
                for (stage, status), count in at.items()
            ),
        )


def _first(errors: BaseExceptionGroup[AsapError]) -> AsapError:
    for error in errors.exceptions:
        return _first(error) if isinstance(error, BaseExceptionGroup) else error
    raise AssertionError("a group holds an error")
