"""A running job on the terminal: a bar for each stage where somebody looks, plain lines elsewhere;
at the end what became of the items. It knows no HTTP.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import TaskID

from asap.methods import METHODS
from asap_cli.answers import FINAL, Item, ItemProblem, Job, one_line
from asap_cli.progress import Bars
from asap_cli.tables import cost_of
from asap_cli.train_views import TrainProgressView, result_table

__all__ = [
    "Failures",
    "JobProgress",
    "TrainJobProgress",
    "open_progress",
    "print_end",
    "print_failures",
    "route_of",
    "stage_progress",
]

LINE_EVERY_S = 10.0
SHOWN_CODES = 5
SCANNED_ITEMS = 100_000
ROUTES = {"train": ("trainer",), "evaluate": ("generate", "grade")}


@dataclass(frozen=True, slots=True)
class StageProgress:
    """Items that a stage has dealt with, of those that can reach it."""

    stage: str
    done: int
    total: int


def route_of(job: Job) -> tuple[str, ...]:
    """The stages of the job's kind and method in order; of unknown ones those that hold items."""
    if job.kind in ROUTES:
        return ROUTES[job.kind]
    method = METHODS.get(str(job.config.get("method")))
    if method is not None:
        return method.stages
    return tuple(dict.fromkeys(count.stage for count in job.counts if count.stage))


def stage_progress(job: Job, route: Sequence[str]) -> list[StageProgress]:
    """Progress by stage: an item that stands at a later stage is through with the earlier ones,
    and one that ended at an earlier stage never gets to the later ones.
    """
    staged = [(route.index(c.stage), c) for c in job.counts if c.stage in route]
    reach = sum(count.items for _, count in staged)
    rows = []
    for here, stage in enumerate(route):
        ended = sum(c.items for at, c in staged if at == here and c.status in FINAL)
        beyond = sum(c.items for at, c in staged if at > here)
        rows.append(StageProgress(stage, beyond + ended, reach))
        reach -= ended
    return rows


class JobProgress(Bars):
    """Shows each state of a job as it comes."""

    def __init__(
        self, console: Console, route: Sequence[str], *, line_every_s: float = LINE_EVERY_S
    ) -> None:
        self._console, self._route, self._line_every_s = console, route, line_every_s
        super().__init__(console, "{task.description}")
        self._bars: dict[str, TaskID] = {}
        self._first: tuple[float, int] | None = None
        self._phase, self._printed_at = "", 0.0

    def show(self, job: Job) -> None:
        """The job's state at this moment."""
        rows = stage_progress(job, self._route)
        if self._console.is_terminal:
            self._show_bars(rows)
        else:
            self._show_line(job, rows)

    def _show_bars(self, rows: Sequence[StageProgress]) -> None:
        for row in rows:
            if row.stage not in self._bars:
                if not row.total:  # no item has come here, and perhaps none will
                    continue
                self._bars[row.stage] = self._progress.add_task(
                    row.stage, total=row.total, completed=row.done, rate=""
                )
            bar = self._bars[row.stage]
            self._progress.update(bar, total=row.total, completed=row.done)
            speed = self._progress.tasks[bar].speed
            self._progress.update(bar, rate=f"{speed:.1f}/s" if speed else "")

    def _show_line(self, job: Job, rows: Sequence[StageProgress]) -> None:
        now, done = time.monotonic(), job.items(*FINAL)
        if self._first is None:
            self._first = (now, done)
        elif job.phase == self._phase and now - self._printed_at < self._line_every_s:
            return
        self._phase, self._printed_at = job.phase, now
        parts = [
            one_line(job.phase),
            *(f"{row.stage} {row.done}/{row.total}" for row in rows if row.total),
        ]
        since, done_then = self._first
        if done > done_then and job.total > done:
            rate = (done - done_then) / (now - since)
            parts.append(f"{rate:.1f} items/s, {(job.total - done) / rate:.0f} s left")
        _print(self._console, ", ".join(parts))


class TrainJobProgress:
    """The steps of a training job, as they come."""

    def __init__(self, console: Console) -> None:
        self._view = TrainProgressView(console)

    def __enter__(self) -> Self:
        self._view.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._view.__exit__(kind, error, trace)

    def show(self, job: Job) -> None:
        """The job's state at this moment; nothing before its process has said a word."""
        if job.train is not None and job.train.progress is not None:
            self._view.show(job.train.progress)


def open_progress(console: Console, job: Job) -> JobProgress | TrainJobProgress:
    """What shows a job of its kind."""
    if job.kind == "train":
        return TrainJobProgress(console)
    return JobProgress(console, route_of(job))


@dataclass(slots=True)
class Failures:
    """The problem codes of a job's failed items: how often, and the first line of each."""

    codes: Counter[str]
    examples: dict[str, Item]

    @classmethod
    def of(cls, job: Job, items: Iterable[Item]) -> Self:
        """What the job says itself; else read `items` until all failed ones are seen, or 100,000
        at most.
        """
        found, failed = cls(Counter(), {}), job.items("failed")
        if job.error_summary is not None:
            for row in job.error_summary:
                problem = ItemProblem(code=row.code, detail=row.detail)
                found.codes[row.code] = row.items
                found.examples[row.code] = Item(
                    line=row.first_line, status="failed", problem=problem
                )
            return found
        for item in islice(items, SCANNED_ITEMS):
            if item.status == "failed":
                code = item.problem.code if item.problem else "unknown"
                found.codes[code] += 1
                found.examples.setdefault(code, item)
                if found.codes.total() >= failed:
                    break
        return found


def print_end(console: Console, job: Job) -> None:
    """One sentence of how the job ended, and what it cost; then what came of it."""
    counts = {name: job.items(name) for name in (*FINAL, "queued", "running")}
    parts = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
    took = "" if job.finished_at is None else f" in {job.finished_at - job.created_at:.1f} s"
    text = f"job {one_line(job.id)} is {one_line(job.phase)}{took}: {parts or 'no items'}"
    cost = cost_of(job)
    _print(console, text if cost is None else f"{text}, cost {cost}", style="bold")
    for problem in job.problems[:SHOWN_CODES]:
        _print(console, f"{one_line(problem.code)}: {one_line(problem.detail)}", style="red")
    if job.train is not None and job.train.result is not None:
        console.print(result_table(job.train.result), highlight=False)
        if job.train.version is not None:
            _print(console, f"model {one_line(job.train.model)}@{job.train.version}", style="bold")


def print_failures(console: Console, job: Job, found: Failures) -> None:
    """The most frequent codes, each with the first line that has it."""
    for code, count in found.codes.most_common(SHOWN_CODES):
        item = found.examples[code]
        detail = one_line(item.problem.detail) if item.problem else "no reason given"
        where = f"line {item.line}" if count == 1 else f"first at line {item.line}"
        _print(console, f"{count:,} × {one_line(code)}, {where}: {detail}", style="red")
    others = len(found.codes) - SHOWN_CODES
    if others > 0:
        _print(console, f"and {others} other problem codes", style="red")
    unseen = job.items("failed") - found.codes.total()
    if unseen > 0:
        rest = "with other codes" if job.error_summary else f"after line {SCANNED_ITEMS:,}"
        _print(console, f"{unseen:,} more failures {rest}", style="red")


def _print(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
