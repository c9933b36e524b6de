"""The training process: `python -m asap_trainer.train --run PREFIX`, alone or under torchrun.

Reads and writes the run's folder in the blob store and nothing else. Ends with 0 when the model is
there, 78 when it refuses, 143 when it was stopped and has written a checkpoint, 1 when it failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
from pydantic import ValidationError

from asap.errors import AsapError, Misconfigured, TrainingFailed
from asap.runs import TrainResult, TrainRun
from asap_runtime.blobs import BlobStore, open_blobs
from asap_runtime.logs import configure_logs, get_logger
from asap_runtime.model_files import locate_model
from asap_runtime.run_files import RunFiles
from asap_runtime.settings import RuntimeSettings, load_settings
from asap_trainer.backends import Device, find_device, load_model, prepare_imports
from asap_trainer.checkpoints import Checkpoint, Checkpoints
from asap_trainer.encoding import Prepared, check_vocabulary, prepare
from asap_trainer.model_card import complete_folder, library_versions, write_card
from asap_trainer.progress import Reporter

if TYPE_CHECKING:
    from asap_trainer.loop import Loop

__all__ = ["main"]

REFUSED, FAILED, STOPPED = 78, 1, 143
LOG_LINES, LINE_CHARACTERS = 50, 2000
LEDGER = "dropped.jsonl"
PATIENCE = timedelta(hours=4)
"""Of processes that wait for each other. torch's ten minutes are less than the first one may need
to fetch the base model and to encode the data."""


class Stopped(Exception):
    """The process was told to end."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out a run, or its preflight. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="asap_trainer.train", description=__doc__)
    parser.add_argument("--run", required=True, help="prefix of the run in the blob store")
    parser.add_argument("--preflight", action="store_true", help="one step, then say what fits")
    parser.add_argument("--price", type=float, help="US dollars for a device and hour")
    chosen = parser.parse_args(arguments)
    settings = load_settings(RuntimeSettings)
    configure_logs(settings.telemetry)
    lines = _keep_lines()
    blobs = open_blobs(settings)
    files = RunFiles(blobs, chosen.run)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    out = sys.stdout
    try:
        with redirect_stdout(sys.stderr):  # libraries print
            process = _Process(settings, blobs, files, stop)
            if chosen.preflight:
                answer = process.preflight(chosen.price)
            else:
                answer = None
                process.train()
    except Stopped:
        get_logger().info("run.stopped")
        return STOPPED
    except Exception as error:
        return _fail(error, files, lines)
    if answer is not None:
        out.write(f"{answer}\n")
    return 0


class _Process:
    """One process of a run: its files, its folder on this machine, its part of the work."""

    def __init__(
        self, settings: RuntimeSettings, blobs: BlobStore, files: RunFiles, stop: threading.Event
    ) -> None:
        self._blobs, self._files, self._stop = blobs, files, stop
        spec = files.read("spec.json")
        if spec is None:
            raise Misconfigured("there is no spec.json below the run's prefix")
        try:
            self.run = TrainRun.model_validate_json(spec)
        except ValidationError as error:
            raise Misconfigured("spec.json is not one of this version of ASAP") from error
        home = settings.home.expanduser().absolute()
        # What a killed process left there is of no use, and may be large.
        self._folder = home / "training" / self.run.id
        self._tokens = home / "tokens"
        self._first = os.environ.get("RANK", "0") == "0"
        self._first_here = os.environ.get("LOCAL_RANK", "0") == "0"

    def train(self) -> None:
        """From spec.json to result.json."""
        with ExitStack() as stack:
            reporter = stack.enter_context(Reporter(self._files if self._first else None))
            self._begin(stack)
            device = find_device(self.run.config)
            reporter.update(phase="preparing")
            with _one_after_another(device):
                base, prepared = self._data()
                checkpoints = Checkpoints(self._files, self._mark(prepared))
                resumed = self._resumed(checkpoints)
            reporter.update(samples=len(prepared.train), dropped=prepared.dropped_by_reason)
            if self._first:
                self._files.write(LEDGER, prepared.ledger.encode())
            self._check()
            stack.enter_context(checkpoints)
            self._fit(base, prepared, resumed, reporter, checkpoints, device)

    def preflight(self, price: float | None) -> str:
        """What the run would take; also left in preflight.json."""
        from asap_trainer.preflight import preflight

        # The run itself may be under way.
        self._folder = self._folder.with_name(f"{self.run.id}-preflight")
        with ExitStack() as stack:
            self._begin(stack)
            base, prepared = self._data()
            lengths = [int(count) for count in prepared.train.tokens]
            answer = preflight(self.run.config, lengths, base, price, self._folder)
        text = answer.model_dump_json(indent=1)
        self._files.write("preflight.json", text.encode())
        return text

    def _begin(self, stack: ExitStack) -> None:
        if self._first_here:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
            stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
        if self._first:
            self._files.delete("problem.json")
        prepare_imports(self.run.config, self._folder)

    def _check(self) -> None:
        if self._stop.is_set():
            raise Stopped

    def _data(self) -> tuple[Path, Prepared]:
        """The base model's folder, and the samples. The first process of a machine fetches."""
        run = self.run
        base = self._base()
        names = [
            self._fetched(key, number) for number, key in enumerate((run.data, *run.common_with))
        ]
        self._check()
        prepared = prepare(names[:1], run.config, base, self._tokens, common_with=names[1:])
        check_vocabulary(prepared, base)
        return base, prepared

    def _base(self) -> Path:
        place = self.run.meta.get("base_prefix")
        if not isinstance(place, str):
            return locate_model(self.run.base, weights=True)
        folder = self._folder / "base"
        if self._first_here:
            prefix, _, name = place.rpartition("/")
            found = RunFiles(self._blobs, prefix).download_folder(name, folder)
            if found != self.run.meta.get("base_sha256"):
                raise Misconfigured("the base model's files are not those of the registry any more")
        return locate_model(str(folder), weights=True)

    def _fetched(self, key: str, number: int) -> Path:
        path = self._folder / f"data-{number}"
        if self._first_here:
            with self._blobs.local(key) as source:
                shutil.copyfile(source, path)
        return path

    def _mark(self, prepared: Prepared) -> str:
        facts = [self.run.config.hash(), prepared.data_sha256, self.run.base, *prepared.train.ids]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _resumed(self, checkpoints: Checkpoints) -> Checkpoint | None:
        folder = self._folder / "resumed"
        return checkpoints.newest(folder) if self._first_here else checkpoints.fetched(folder)

    def _fit(
        self,
        base: Path,
        prepared: Prepared,
        resumed: Checkpoint | None,
        reporter: Reporter,
        checkpoints: Checkpoints,
        device: Device,
    ) -> None:
        from asap_trainer.loop import Loop  # transformers, which the backend comes before

        run = self.run
        started = time.monotonic()
        model = load_model(run.config, base, device)
        self._check()
        loop = Loop(
            config=run.config,
            device=device,
            train=prepared.train,
            held_out=prepared.held_out,
            peak=run.config.peak_learning_rate(model.config.model_type),
            reporter=reporter,
            store=checkpoints.store,
            stop=self._stop,
            folder=self._folder,
        )
        get_logger().info("run.started", device=device.name, resumed=resumed and resumed.step)
        trainer = loop.run(model, [int(count) for count in prepared.train.tokens], resumed)
        if loop.stopped:
            raise Stopped
        reporter.update(phase="saving")
        folder = self._folder / "model"
        trainer.save_model(str(folder))
        if self._first:
            complete_folder(folder, base, prepared.template, run)
            (folder / LEDGER).write_text(prepared.ledger, encoding="utf-8")
            result = _result(loop, prepared, run, device, reporter)
            write_card(folder, run, result)
            sha256 = self._files.upload_folder(folder, "model")
            result = result.model_copy(update={"model_sha256": sha256})
            self._files.write("result.json", result.model_dump_json(indent=1).encode())
            get_logger().info("run.done", seconds=time.monotonic() - started)
        reporter.update(phase="done", eta_s=0.0)


def _result(
    loop: Loop, prepared: Prepared, run: TrainRun, device: Device, reporter: Reporter
) -> TrainResult:
    figures, rows, steps = loop.figures, reporter.rows, reporter.progress.step
    return TrainResult(
        model_sha256="",  # known once the card is written, which says all the rest
        steps=steps,
        samples=len(prepared.train),
        held_out=len(prepared.held_out),
        dropped=prepared.dropped_by_reason,
        tokens_per_sample=prepared.tokens_per_sample,
        response_tokens_per_sample=prepared.response_tokens_per_sample,
        tokens_per_step=figures.tokens / steps,
        step_seconds=figures.step_seconds,
        seconds=figures.seconds,
        loss_first=rows[0]["loss"],
        loss_last=rows[-1]["loss"],
        held_out_loss_before=figures.held_out_before,
        held_out_loss_after=figures.held_out_after,
        peak_memory_bytes=reporter.progress.peak_memory_bytes,
        data_sha256=prepared.data_sha256,
        template=prepared.template.name,
        base=run.base,
        device=device.name,
        versions=library_versions(),
    )


@contextmanager
def _one_after_another(device: Device) -> Iterator[None]:
    """The first process of each machine goes before the others, which find its files."""
    if device.processes == 1:
        yield
        return
    from accelerate import PartialState

    on_cpu = device.torch_device.type == "cpu"
    with PartialState(cpu=on_cpu, timeout=PATIENCE).local_main_process_first():
        yield


def _keep_lines() -> deque[str]:
    """The last events that are logged from now on, as lines of JSON. None of them holds a text."""
    lines: deque[str] = deque(maxlen=LOG_LINES)

    def keep(logger: object, method: str, event: Any) -> Any:
        lines.append(json.dumps(event, default=str)[:LINE_CHARACTERS])
        return event

    *before, renderer = structlog.get_config()["processors"]
    structlog.configure(processors=[*before, keep, renderer])
    return lines


def _fail(error: Exception, files: RunFiles, lines: Sequence[str]) -> int:
    """Leave problem.json, and the exit code for it. Messages of others may quote a sample."""
    refused = isinstance(error, AsapError) and not (
        error.retryable or isinstance(error, TrainingFailed)
    )
    code, detail = TrainingFailed.code, f"the training process failed: {type(error).__name__}"
    if isinstance(error, AsapError):
        code, detail = error.problem_code, error.detail
    get_logger().error("run.failed", code=code, exc_info=error)
    problem = {"code": code, "detail": detail, "log": "\n".join(lines)}
    with suppress(AsapError):  # the log says it, too
        files.write("problem.json", json.dumps(problem).encode())
    return REFUSED if refused else FAILED


if __name__ == "__main__":
    sys.exit(main())
