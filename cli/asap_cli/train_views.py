"""A training run on the terminal: what carries loss, what a run would take, how it goes, what came
of it. It opens nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from asap.runs import TrainProgress, TrainResult
from asap_cli.progress import Bars
from asap_cli.terminal import printable

if TYPE_CHECKING:
    from asap_trainer.preview import Piece, Spread, TokenStatistics

__all__ = [
    "TrainProgressView",
    "preflight_table",
    "preview_texts",
    "result_table",
    "statistics_table",
]

LINE_EVERY_S = 10.0
GIGA = 1e9


def preview_texts(ids: Sequence[str], previews: Sequence[Sequence[Piece]]) -> Iterator[Text]:
    """Each sample with what carries loss in green, and a rule that says so without colours."""
    for id, pieces in zip(ids, previews, strict=False):
        yield Text(f"─── {printable(id)}", style="bold")
        for piece in pieces:
            text = printable(piece.text)
            if piece.carries_loss:
                yield Text("─── loss from here on", style="dim green")
            yield Text(text, style="green" if piece.carries_loss else "dim")
        yield Text()


def statistics_table(figures: TokenStatistics, template: str) -> Table:
    """Tokens of samples and of what carries loss."""
    table = Table("tokens", "mean", "p50", "p95", "max", box=None, header_style="dim")
    table.add_row("sample", *_spread(figures.sample))
    table.add_row("with loss", *_spread(figures.response))
    table.caption = f"{figures.count:,} samples, {figures.held_out:,} held out, template {template}"
    for reason, count in sorted(figures.dropped.items()):
        table.caption += f"; {count:,} dropped: {reason}"
    table.caption_justify = "left"
    return table


def _spread(spread: Spread) -> Iterator[str]:
    yield f"{spread.mean:,.0f}"
    yield from (f"{count:,}" for count in (spread.p50, spread.p95, spread.max))


def preflight_table(answer: str | bytes) -> Table:
    """The asked setting and the ones that do better, from the JSON of a preflight."""
    found = json.loads(answer)
    table = Table("setting", "fits", "GB", "s/step", "steps", "dropped", "hours", "USD", box=None)
    table.header_style = "dim"
    for name, cost in (
        ("as asked", found["asked"]),
        *((_change(one["change"]), one) for one in found["suggestions"]),
    ):
        table.add_row(
            name,
            "yes" if cost["fits"] else "no",
            _number(cost["peak_memory_bytes"], 1 / GIGA, 2),
            _number(cost["step_seconds"], 1, 3),
            _number(cost["steps"], 1, 0),
            _number(cost["dropped"], 1, 0),
            _number(cost["hours"], 1, 3),
            _number(cost["usd"], 1, 2),
        )
    table.caption = f"measured on {found['device']}" if found["device"] else None
    return table


def _change(change: dict[str, object]) -> str:
    return ", ".join(f"{name}={json.dumps(value)}" for name, value in change.items())


def _number(value: float | None, scale: float, digits: int) -> str:
    return "-" if value is None else f"{value * scale:,.{digits}f}"


def result_table(result: TrainResult) -> Table:
    """What came of a run."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(result.dropped.items()))
    rows = {
        "steps": f"{result.steps:,} in {result.seconds:,.0f} s ({result.step_seconds:.3f} s each)",
        "samples": f"{result.samples:,}" + (f"; dropped: {dropped}" if dropped else ""),
        "tokens": f"{result.tokens_per_sample:,.0f} a sample, "
        f"{result.response_tokens_per_sample:,.0f} with loss, {result.tokens_per_step:,.0f} a step",
        "loss": f"{result.loss_first:.4f} → {result.loss_last:.4f}",
    }
    before, after = result.held_out_loss_before, result.held_out_loss_after
    if before is not None and after is not None:
        rows["held out"] = f"{result.held_out:,} samples, loss {before:.4f} → {after:.4f}"
    if result.peak_memory_bytes is not None:
        rows["memory"] = f"{result.peak_memory_bytes / GIGA:.2f} GB at most"
    rows["machine"] = printable(result.device)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


class TrainProgressView(Bars):
    """A bar of steps where somebody looks, a line every ten seconds elsewhere."""

    def __init__(self, console: Console, *, line_every_s: float = LINE_EVERY_S) -> None:
        self._console, self._line_every_s = console, line_every_s
        super().__init__(console, "{task.description}", TextColumn("{task.fields[figures]}"))
        self._task: TaskID | None = None
        self._phase, self._printed_at = "", 0.0

    def show(self, state: TrainProgress) -> None:
        """The run's state at this moment."""
        if not self._console.is_terminal:
            self._line(state)
            return
        if self._task is None:
            self._task = self._progress.add_task(state.phase, rate="", figures="")
        self._progress.update(
            self._task,
            description=state.phase,
            total=state.total_steps,
            completed=state.step,
            rate="" if state.tokens_per_s is None else f"{state.tokens_per_s:,.0f} tokens/s",
            figures=_figures(state),
        )

    def _line(self, state: TrainProgress) -> None:
        now = time.monotonic()
        if state.phase == self._phase and now - self._printed_at < self._line_every_s:
            return
        self._phase, self._printed_at = state.phase, now
        steps = f" {state.step}/{state.total_steps}" if state.total_steps else ""
        figures = _figures(state)
        text = f"{state.phase}{steps}{', ' if figures else ''}{figures}"
        self._console.print(text, highlight=False, markup=False)


def _figures(state: TrainProgress) -> str:
    parts = {
        "loss": (state.loss, ".4f"),
        "lr": (state.learning_rate, ".2e"),
        "grad norm": (state.grad_norm, ".3f"),
    }
    known = [f"{name} {value:{form}}" for name, (value, form) in parts.items() if value is not None]
    if state.eta_s is not None:
        known.append(f"{state.eta_s:.0f} s left")
    return ", ".join(known)
