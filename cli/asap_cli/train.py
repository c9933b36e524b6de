"""`asap train`: a run on this machine, by the same process that a server or a cluster starts.

The files of the run lie in the blob store of the settings, below an id that follows from data, base
and recipe: the same command finds what an interrupted one has left, and goes on.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from asap.errors import InvalidInput, NotFound, TrainingFailed
from asap.runs import Launch, TrainProgress, TrainResult, TrainRun
from asap.train_config import TrainConfig
from asap_cli.roles import AllSettings
from asap_cli.train_views import (
    TrainProgressView,
    preflight_table,
    preview_texts,
    result_table,
    statistics_table,
)
from asap_runtime.blobs import BlobStore, open_blobs
from asap_runtime.datasets import ENDINGS, ending_of
from asap_runtime.problems import INTERRUPTED
from asap_runtime.run_files import RunFiles
from asap_runtime.settings import load_settings
from asap_trainer.encoding import HFEncoder, prepare
from asap_trainer.launcher import Status, ended, launch_name
from asap_trainer.local import LocalLauncher, training_environment
from asap_trainer.preview import preview_samples, token_statistics

__all__ = ["TrainOptions", "run_preflight", "run_preview", "run_train"]

TENANT = "local"
LOOK_S = 0.5
COPY = 8 * 2**20


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """One train command."""

    source: Path
    out: Path | None
    base: str
    config: TrainConfig
    common_with: tuple[Path, ...] = ()
    price: float | None = None
    """US dollars for a device and hour."""


def run_preview(options: TrainOptions) -> int:
    """Print what five samples give the loss, and the statistics of all; start nothing."""
    settings = load_settings(AllSettings)
    tokens = settings.home.expanduser().absolute() / "tokens"
    prepared = prepare(
        [options.source], options.config, options.base, tokens, common_with=options.common_with
    )
    console = Console()
    encoder = HFEncoder.load(options.base)
    for text in preview_texts(prepared.train.ids, preview_samples(prepared, encoder)):
        console.print(text)
    console.print(statistics_table(token_statistics(prepared), prepared.template.name))
    return 0


def run_preflight(options: TrainOptions) -> int:
    """Take one real step at full length and print what the run would take."""
    run = _LocalRun(load_settings(AllSettings), options)
    command = [sys.executable, "-m", "asap_trainer.train", "--run", run.prefix, "--preflight"]
    if options.price is not None:
        command += ["--price", str(options.price)]
    with Console(stderr=True).status("taking a step at full length"):
        done = subprocess.run(
            command,
            env=training_environment(run.settings, os.environ),
            capture_output=True,
            check=False,
        )
    if done.returncode:
        raise run.failure(ended(done.returncode))
    Console().print(preflight_table(done.stdout), highlight=False)
    return 0


def run_train(options: TrainOptions) -> int:
    """Train, or go on; then put the model in OUT. Returns the exit code."""
    assert options.out is not None, "the command asks for it"
    _check_out(options.out)
    console, settings = Console(stderr=True), load_settings(AllSettings)
    run = _LocalRun(settings, options)
    console.print(f"[dim]run {run.id}, logs below {run.settings.work_dir}[/]", highlight=False)
    try:
        asyncio.run(run.follow(console))
    except KeyboardInterrupt:
        console.print("stopped at a checkpoint; the same command goes on from there")
        return INTERRUPTED
    result = run.result()
    run.files.download_folder("model", options.out)
    console.print(result_table(result), highlight=False)
    console.print(f"model written to {options.out}", highlight=False, markup=False)
    return 0


class _LocalRun:
    """A run of this machine: its files, its process."""

    def __init__(self, settings: AllSettings, options: TrainOptions) -> None:
        blobs = open_blobs(settings)
        sources = [options.source, *options.common_with]
        base = str(Path(options.base).resolve()) if Path(options.base).is_dir() else options.base
        facts = [options.config.hash(), base, *_files_of(Path(base)), *map(_sha256, sources)]
        self.id = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
        keys = [f"{TENANT}/runs/{self.id}/{_data_name(n, path)}" for n, path in enumerate(sources)]
        for path, key in zip(sources, keys, strict=True):
            _store(blobs, key, path)
        run = TrainRun(
            id=self.id,
            tenant=TENANT,
            config=options.config,
            base=base,
            model="local",
            data=keys[0],
            common_with=tuple(keys[1:]),
        )
        self.prefix, self.files = run.prefix, RunFiles(blobs, run.prefix)
        self.files.write("spec.json", run.model_dump_json(indent=1).encode())
        self.settings, self._run = _apart(settings), run
        self.launcher = LocalLauncher(self.settings)

    async def follow(self, console: Console) -> None:
        """Until the run has ended well. An interrupt stops it, with time for a checkpoint.

        Raises TrainingFailed when it came to a bad end.
        """
        if self.files.read("result.json") is not None:
            return
        launch = await self._launched()
        with _interrupts() as interrupted, TrainProgressView(console) as view:
            while (status := await self.launcher.look(launch)).phase == "running":
                if interrupted.is_set():
                    await self.launcher.stop(launch)
                elif progress := self._progress():
                    view.show(progress)
                await asyncio.sleep(LOOK_S)
            if progress := self._progress():
                view.show(progress)
        if interrupted.is_set() and status.phase != "succeeded":
            raise KeyboardInterrupt
        if status.phase != "succeeded":
            raise self.failure(status)

    async def _launched(self) -> Launch:
        """The process that works on the run now, or a new one behind those that have ended."""
        attempt = 0
        while True:
            name = launch_name(self.id, attempt)
            launch = Launch(launcher="subprocess", name=name, attempt=attempt)
            phase = (await self.launcher.look(launch)).phase
            if phase == "running":
                return launch
            if phase == "gone":
                return await self.launcher.launch(self._run, attempt)
            attempt += 1

    def _progress(self) -> TrainProgress | None:
        written = self.files.read("progress.json")
        return None if written is None else TrainProgress.model_validate_json(written)

    def result(self) -> TrainResult:
        """What the finished run says of itself."""
        written = self.files.read("result.json")
        if written is None:
            raise TrainingFailed("the training process ended well and left no result")
        return TrainResult.model_validate_json(written)

    def failure(self, status: Status) -> TrainingFailed | InvalidInput:
        """What the process says of its end, else what its end says."""
        written = self.files.read("problem.json")
        if written is None:
            return TrainingFailed(
                f"the training process ended with {status.exit_code} "
                f"({status.reason or status.phase}); its log is below {self.settings.work_dir}"
            )
        said = json.loads(written)
        kind = InvalidInput if status.reason == "refused" else TrainingFailed
        return kind(said["detail"], code=said["code"])


def _apart(settings: AllSettings) -> AllSettings:
    """A server of the same home stops what works in its own folder on none of its jobs."""
    own = {"work_dir": settings.work_dir / "here"}
    return settings.model_copy(update={"trainer": settings.trainer.model_copy(update=own)})


def _files_of(base: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of each file of a model's directory: one that was trained anew, in place
    of the old, is another base.
    """
    files = sorted(base.iterdir()) if base.is_dir() else []
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise NotFound(f"{str(path)!r} cannot be read: {error.strerror}") from error


def _data_name(number: int, path: Path) -> str:
    ending = ending_of(path.name)
    if ending is None:
        raise InvalidInput(f"{path.name!r}: the data must end in one of {', '.join(ENDINGS)}")
    return f"data-{number}{ending}"


def _store(blobs: BlobStore, key: str, path: Path) -> None:
    with path.open("rb") as source, blobs.create(key) as writer:
        while block := source.read(COPY):
            writer.write(block)


def _check_out(out: Path) -> None:
    """A model is written over a model, and over nothing else."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / "run.json").exists()):
        raise InvalidInput(f"OUT {str(out)!r} exists and is no model of an earlier run")


@contextmanager
def _interrupts() -> Iterator[asyncio.Event]:
    """Set by Ctrl-C and SIGTERM while the block runs."""
    event, loop = asyncio.Event(), asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, event.set)
    try:
        yield event
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
