"""`asap eval run` and `asap eval grade`: an evaluation on this machine, without a server.

The items are those of a server, and so are the two stages that they go through. What they come to
is appended to the folder's file at each step: the same command goes on where a killed one stopped.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue
from rich.console import Console

from asap.errors import AsapError, InvalidInput
from asap.eval_config import EvalConfig
from asap.eval_items import EvalItem
from asap_cli.answers import FINAL, Job, StageCount
from asap_cli.completions import Completions
from asap_cli.eval_folder import EvalFolder, Task, task_of, write_reports
from asap_cli.eval_reports import page_of, report_of
from asap_cli.eval_views import report_table
from asap_cli.model_fetch import ENDINGS, manifest_of
from asap_cli.roles import AllSettings
from asap_cli.server_commands import DATA_ERROR, print_table, say
from asap_cli.watch import JobProgress
from asap_evaluator.stage import GenerateStage, GradeStage
from asap_runtime.benchmarks import BenchmarkFolder
from asap_runtime.blobs import open_blobs
from asap_runtime.evaluations import evaluation_items
from asap_runtime.host import open_database
from asap_runtime.intake import StoredEvaluation
from asap_runtime.models import ModelRegistry, parse_reference
from asap_runtime.problems import INTERRUPTED
from asap_runtime.settings import load_settings
from asap_runtime.stage import Done, Stage
from asap_runtime.takings import Taking
from asap_runtime.telemetry import configure_logs

__all__ = ["EvalOptions", "run_eval", "run_grade"]

TENANT = "local"
TRIES = 4
"""Of one step of one task, where the trouble may pass."""
PAUSE_S = 2.0
"""After the first of them; it doubles. A server that says how long is given that."""
SHOW_S = 0.5
ROUTE = ("generate", "grade")


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """One command."""

    model: str
    """Hub name, directory or `name@version`; of existing completions any name."""
    config: EvalConfig
    out: Path
    data: Path | None = None
    """Folder with the benchmarks' files; default: that of the settings."""
    base_url: str | None = None
    served_model: str | None = None
    samples: Path | None = None
    """Completions that are there already; else the model is asked."""


def run_eval(options: EvalOptions) -> int:
    """Ask the model, grade, and write the reports. Returns the exit code."""
    settings = _settings(options)
    source, label, identity = _model(settings, options.model)
    with EvalFolder(options.out) as folder:
        items = _items(settings, options, source, identity, folder)
        generate = GenerateStage(settings, blobs=open_blobs(settings))
        grade = GradeStage(settings, blobs=folder.blobs)
        return _finished(folder, items, label, _Run(folder, (generate, grade)), grade)


def run_grade(options: EvalOptions) -> int:
    """Grade completions that are there already, and write the reports. Returns the exit code."""
    assert options.samples is not None, "the command asks for it"
    settings = _settings(options)
    completions = Completions.read(options.samples)
    with EvalFolder(options.out) as folder:
        source = StoredEvaluation(options.model, None, None)
        items = _items(settings, options, source, completions.sha256, folder)
        filled = [item for item in map(completions.fill, items) if item.samples]
        completions.check(items)
        grade = GradeStage(settings, blobs=folder.blobs)
        return _finished(folder, filled, options.model, _Run(folder, (grade,)), grade)


def _settings(options: EvalOptions) -> AllSettings:
    given: dict[str, Any] = {}
    if options.base_url is not None:
        given = {
            "base_url": options.base_url,
            "served_model": options.served_model or options.model,
        }
    if Path(options.model).expanduser().is_dir():
        given["models"] = Path(options.model).expanduser().resolve()
    settings = load_settings(AllSettings, evaluator=given) if given else load_settings(AllSettings)
    configure_logs(settings.telemetry.model_copy(update={"log_level": "warning"}))
    return settings


def _model(settings: AllSettings, model: str) -> tuple[StoredEvaluation, str, str]:
    """What the items name, what the report calls it, and what tells it from its namesakes."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.name.endswith(ENDINGS))
        sha256 = hashlib.sha256(manifest_of(folder, files)).hexdigest()
        return StoredEvaluation(str(folder.resolve()), None, None), folder.resolve().name, sha256
    reference = parse_reference(model)
    if reference is None:
        return StoredEvaluation(model, None, None), model, model
    database = open_database(settings)
    try:
        found = ModelRegistry(database).get(TENANT, *reference)
    finally:
        database.close()
    source = StoredEvaluation(found.reference, found.prefix, found.manifest_sha256)
    return source, found.reference, found.manifest_sha256


def _items(
    settings: AllSettings,
    options: EvalOptions,
    source: StoredEvaluation,
    identity: str,
    folder: EvalFolder,
) -> list[EvalItem]:
    """All tasks of the run as they stand. Raises InvalidInput when the folder is another run's."""
    facts = [options.config.hash(), source.model, identity]
    run_id = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    known = {task_of(item): item for item in folder.items()}
    if any(item.id != run_id for item in known.values()):
        raise InvalidInput(
            f"{str(folder.path)!r} holds another evaluation: of another model, or with another "
            "configuration; name another folder"
        )
    taking = Taking(
        job_id=run_id,
        tenant=TENANT,
        config=options.config.model_dump(mode="json"),
        priority=0,
        source=source,
        lease=0,
        line=0,
        items=0,
        bad=0,
    )
    first = next(iter(known.values()), None)
    benchmarks = BenchmarkFolder(options.data or settings.benchmarks)
    asked = evaluation_items(
        benchmarks,
        folder.blobs,
        taking,
        source,
        None if first is None else first.model_dump_json().encode(),
        lambda: None,
    )
    items = [EvalItem.model_validate_json(new.payload or b"") for new in asked]
    return [known.get(task_of(item), item) for item in items]


def _finished(
    folder: EvalFolder, items: Sequence[EvalItem], label: str, run: _Run, grade: GradeStage
) -> int:
    """Run, and tell of it; also when it was stopped, of what is done. The exit code."""
    facts: dict[str, JsonValue] = {}
    try:
        code = asyncio.run(run.follow(items, grade, facts))
    except (KeyboardInterrupt, asyncio.CancelledError):
        code = INTERRUPTED
    done = list(folder.items())
    if done:
        report = report_of(done, label, facts={"sandbox": facts} if facts else {})
        write_reports(folder.path, report, page_of(report, {}))
        print_table(report_table(report))
    if code == INTERRUPTED:
        say("stopped; the same command goes on from here")
    for problem, count in run.problems.most_common():
        say(f"{count:,} × {problem}")
    say(f"{len(done):,} of {len(items):,} questions in {folder.path}")
    return code


class _Run:
    """Items on their way through the stages, all at once, each step written down."""

    def __init__(self, folder: EvalFolder, stages: Sequence[Stage[EvalItem]]) -> None:
        self._folder, self._stages = folder, stages
        self._at: dict[Task, tuple[str, str]] = {}
        self.problems: Counter[str] = Counter()
        """What single tasks could not be asked or graded for."""

    async def follow(
        self, items: Sequence[EvalItem], grade: GradeStage, facts: dict[str, JsonValue]
    ) -> int:
        """Until all items are through; the exit code. `facts` gets those of the sandbox.

        Raises what would end every other item as well: no sandbox, no vLLM, no such model.
        """
        stop = asyncio.current_task()
        assert stop is not None, "this is a coroutine"
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.cancel)
        async with AsyncExitStack() as stack:
            for stage in reversed(self._stages):  # no model is loaded where nothing can be graded
                stack.push_async_callback(stage.stop)
                await stage.start()
            await grade.ready()
            facts.update(grade.facts)
            with JobProgress(Console(stderr=True), [stage.name for stage in self._stages]) as bars:
                showing = asyncio.create_task(self._show(bars, len(items)))
                stack.callback(showing.cancel)
                await self._all(items)
                bars.show(self._state(len(items)))
        return DATA_ERROR if self.problems else 0

    async def _all(self, items: Iterable[EvalItem]) -> None:
        slots = {stage.name: asyncio.Semaphore(stage.concurrency) for stage in self._stages}
        try:
            async with asyncio.TaskGroup() as group:
                for item in items:
                    self._at[task_of(item)] = (self._stages[0].name, "queued")
                    group.create_task(self._one(item, slots))
        except* AsapError as errors:
            raise _first(errors) from None

    async def _one(self, item: EvalItem, slots: Mapping[str, asyncio.Semaphore]) -> None:
        task = task_of(item)
        try:
            for stage in self._stages:
                self._at[task] = (stage.name, "queued")
                async with slots[stage.name]:
                    item = await self._through(stage, item)
            self._at[task] = (self._stages[-1].name, "succeeded")
        except InvalidInput as error:
            self._at[task] = (self._at[task][0], "failed")
            self.problems[f"{error.problem_code}: {error.detail}"] += 1

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
