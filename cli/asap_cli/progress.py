"""Live progress of a prune run: rate, time left, tokens saved, LLM cost so far. Silent without a
terminal.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from asap.estimate import Summary
from asap.types import Record


class Bars:
    """Bars with a share, a rate (a field of the task) and the time left, while the block runs."""

    def __init__(self, console: Console, label: str, *more: ProgressColumn) -> None:
        self._progress = Progress(
            TextColumn(label),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            *more,
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()


class PruneProgress(Bars):
    """A progress bar over the lines of IN."""

    def __init__(self, console: Console, total: int | None, resumed: int) -> None:
        self._summary = Summary()
        super().__init__(console, "pruning", TextColumn("{task.fields[saved]}"))
        self._task = self._progress.add_task("", total=total, completed=resumed, rate="", saved="")

    def add(self, record: Record) -> None:
        """Count one finished record."""
        self._summary.add(record)

    def show(self, done: int) -> None:
        """So many lines of IN are dealt with."""
        summary = self._summary
        elapsed = self._progress.tasks[0].elapsed or 0.0
        rate = f"{summary.records / elapsed:.1f}/s" if elapsed else ""
        saved = f"{summary.tokens - summary.pruned_tokens:,} tokens saved"
        cost = summary.usage.cost_usd
        if cost is not None:
            saved += f", ${cost:.4f}"
        self._progress.update(self._task, completed=done, rate=rate, saved=saved)
