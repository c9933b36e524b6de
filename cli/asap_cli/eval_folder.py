"""A folder with an evaluation: what was asked and answered, a line for each step, and the reports.

    items.jsonl     EvalItem, appended; the last line of a task counts
    problems/       tests too large for a line
    report.json, report.md, report.html

A line is with the operating system before the next step begins, so a killed run loses what was
being generated and nothing else. Its last line may be cut; it is dropped.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Self

from pydantic import ValidationError

from asap.errors import InvalidInput, Misconfigured, NotFound
from asap.eval_items import EvalItem
from asap.report import Report
from asap.report_markdown import render_markdown
from asap_runtime.blobs import BlobStore

__all__ = [
    "EvalFolder",
    "Task",
    "is_done",
    "read_items",
    "read_report",
    "task_of",
    "write_reports",
]

Task = tuple[tuple[str, str], ...]
"""Benchmark and task id of each of an item's problems."""
ITEMS = "items.jsonl"


def task_of(item: EvalItem) -> Task:
    """What an item is known by within a run."""
    return tuple((problem.benchmark, problem.task_id) for problem in item.problems)


class EvalFolder:
    """One run's items on disk, by task; one process at a time holds it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.blobs = BlobStore.in_folder(path)
        """Of large problems, below the tenant of the run."""
        self._offsets: dict[Task, int] = {}
        path.mkdir(parents=True, exist_ok=True)
        self._stream: IO[bytes] = (path / ITEMS).open("a+b")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._stream.close()
            raise Misconfigured(
                f"another run is writing to {str(path)!r}; wait for it or name another folder"
            ) from None
        self._load()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def __len__(self) -> int:
        return len(self._offsets)

    def get(self, task: Task) -> EvalItem | None:
        """The task as it stands, if anything is known of it."""
        offset = self._offsets.get(task)
        if offset is None:
            return None
        self._stream.seek(offset)
        return EvalItem.model_validate_json(self._stream.readline())

    def items(self) -> Iterator[EvalItem]:
        """All tasks as they stand, in the order in which they came."""
        for task in list(self._offsets):
            if (item := self.get(task)) is not None:
                yield item

    def put(self, item: EvalItem) -> None:
        """Write how a task stands now."""
        self._stream.seek(0, 2)
        self._offsets[task_of(item)] = self._stream.tell()
        self._stream.write(item.model_dump_json().encode() + b"\n")
        self._stream.flush()

    def _load(self) -> None:
        self._stream.seek(0)
        end = 0
        for number, line in enumerate(self._stream, start=1):
            if not line.endswith(b"\n"):
                break
            self._offsets[task_of(_parse(line, self.path, number))] = end
            end += len(line)
        self._stream.truncate(end)


def read_items(folder: Path) -> list[EvalItem]:
    """All tasks of a run's folder as they stand, also while it runs. Raises NotFound."""
    found: dict[Task, EvalItem] = {}
    try:
        with (folder / ITEMS).open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.endswith(b"\n"):
                    item = _parse(line, folder, number)
                    found[task_of(item)] = item
    except OSError as error:
        raise NotFound(f"{str(folder)!r} holds no evaluation: {error.strerror}") from error
    return list(found.values())


def is_done(item: EvalItem, *, asked: bool) -> bool:
    """Whether all of an item's completions are graded; `asked`: and all are there that a model was
    to be asked for.
    """
    samples = len(item.samples)
    whole = samples == len(item.budgets) * item.config.samples if asked else samples > 0
    graded = len(item.grades) == samples * len(item.problems) * len(item.config.extractions)
    return whole and graded


def read_report(folder: Path) -> Report | None:
    """What the folder's last run has written; None when that is nothing of use."""
    try:
        return Report.model_validate_json((folder / "report.json").read_bytes())
    except (OSError, ValidationError):
        return None


def write_reports(folder: Path, report: Report, page: str) -> None:
    """report.json, report.md and report.html, each whole."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"json": report.to_json(), "md": render_markdown(report), "html": page}
    for ending, text in texts.items():
        part = folder / f".report.{ending}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(folder / f"report.{ending}")


def _parse(line: bytes, folder: Path, number: int) -> EvalItem:
    try:
        return EvalItem.model_validate_json(line)
    except ValidationError:
        raise InvalidInput(
            f"{str(folder / ITEMS)!r}, line {number}: not an item of an evaluation", line=number
        ) from None
