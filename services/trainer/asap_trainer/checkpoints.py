"""What a killed run goes on from: checkpoints, brought to the blob store while training goes on.

A checkpoint counts when its manifest is there and every hash of it is right. Knows folders and
steps; what lies in them is the trainer's business, but for one file of figures.
"""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any, NamedTuple

import tenacity

from asap.errors import AsapError
from asap_runtime.logs import get_logger
from asap_runtime.run_files import RunFiles

__all__ = ["Checkpoint", "Checkpoints"]

FOLDER, FIGURES = "checkpoints", "asap.json"
KEPT = 2
ATTEMPTS = 5
"""To store a checkpoint, and pauses of 1, 2, 4 … seconds; then the next one is waited for."""


class Checkpoint(NamedTuple):
    """One that was found good, on this machine."""

    step: int
    folder: Path
    figures: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run; as a context manager it ends when the last one is stored.

    Args:
        files: of the run.
        mark: what a checkpoint has to be of: hashes of config and data. Another one's is skipped.
    """

    def __init__(self, files: RunFiles, mark: str) -> None:
        self._files, self._mark = files, mark
        self._log = get_logger()
        self._change = threading.Condition()
        self._waiting: tuple[int, Path] | None = None
        self._over = False
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)

    def __enter__(self) -> Checkpoints:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        with self._change:
            self._over = True
            self._change.notify()
        self._thread.join()

    def newest(self, folder: Path) -> Checkpoint | None:
        """Fetch the newest good checkpoint to `folder`; None when there is none.

        A damaged one is skipped with a warning.
        """
        for name in reversed(self._files.complete_folders(FOLDER)):
            try:
                self._files.download_folder(name, folder)
            except AsapError as error:
                if error.retryable:
                    raise
                self._log.warning("checkpoint.skipped", name=name, reason=error.detail)
                continue
            figures = _figures(folder)
            if figures.get("mark") == self._mark:
                return Checkpoint(figures["step"], folder, figures)
            self._log.warning("checkpoint.skipped", name=name, reason="of another config or data")
        shutil.rmtree(folder, ignore_errors=True)
        return None

    def fetched(self, folder: Path) -> Checkpoint | None:
        """What another process of this machine has fetched to `folder`."""
        figures = _figures(folder)
        return Checkpoint(figures["step"], folder, figures) if figures else None

    def store(self, step: int, folder: Path, figures: dict[str, Any]) -> None:
        """Take over a folder that is written, with figures of our own. Returns at once; a folder
        that still waits for the store then is overtaken by this one.
        """
        marked = {**figures, "step": step, "mark": self._mark}
        (folder / FIGURES).write_text(json.dumps(marked))
        with self._change:
            overtaken, self._waiting = self._waiting, (step, folder)
            self._change.notify()
        if overtaken is not None:
            shutil.rmtree(overtaken[1], ignore_errors=True)

    def _run(self) -> None:
        while (job := self._next()) is not None:
            step, folder = job
            try:
                self._upload(folder, f"{FOLDER}/step-{step}")
                self._log.info("checkpoint.stored", step=step)
                self._tidy(step)
            except AsapError as error:
                self._log.warning("checkpoint.not_stored", step=step, code=error.problem_code)
            except Exception as error:  # the thread must live for the next one
                self._log.warning("checkpoint.not_stored", step=step, exc_info=error)
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def _next(self) -> tuple[int, Path] | None:
        with self._change:
            self._change.wait_for(lambda: self._over or self._waiting is not None)
            job, self._waiting = self._waiting, None
            return job

    @tenacity.retry(
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=tenacity.wait_exponential(),
        retry=tenacity.retry_if_exception_type(AsapError),
        reraise=True,
    )
    def _upload(self, folder: Path, name: str) -> None:
        self._files.upload_folder(folder, name)

    def _tidy(self, newest: int) -> None:
        """Keep this one and the one before; what is later is of a process that went astray."""
        whole = [
            name
            for name in self._files.complete_folders(FOLDER)
            if int(name.rpartition("-")[2]) <= newest
        ]
        for name in self._files.folders(FOLDER):
            if name not in whole[-KEPT:]:
                self._files.delete_folder(name)


def _figures(folder: Path) -> dict[str, Any]:
    try:
        figures: dict[str, Any] = json.loads((folder / FIGURES).read_text())
    except (OSError, ValueError):
        return {}
    return figures
