"""`asap show`: one trace on the terminal, and the table of methods."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from asap.errors import NotFound
from asap.methods import METHODS
from asap.types import Attempt, MatchReport, Record
from asap_cli.terminal import printable
from asap_runtime.datasets import read_records


def run_show(source: str, id: str | None, console: Console) -> None:
    """Print the record whose id is, or starts with, `id`; the first record without one."""
    record = _find(source, id)
    console.print(_title(record))
    if record.coarse is not None and record.coarse.attempts:
        console.print(_attempts_table(record.coarse.attempts), end="\n\n")
    console.print(_steps_table(record))


def _find(source: str, id: str | None) -> Record:
    """The record of that id; failing that the first whose id starts so."""
    candidate = None
    for record in read_records(source):
        if id is None or record.id == id:
            return record
        if candidate is None and record.id.startswith(id):
            candidate = record
    if candidate is None:
        raise NotFound(f"no record in {source!r} has the id {id!r}")
    return candidate


def _title(record: Record) -> Text:
    title = Text.assemble(
        (printable(record.id), "bold"), f"  {record.status}, method {record.config.method}"
    )
    if record.tokens is not None:
        tokens = record.tokens
        counts = " → ".join(f"{n:,}" for n in (tokens.original, tokens.coarse, tokens.pruned))
        title.append(f", {counts} tokens ({tokens.tokenizer})")
    if record.flags:
        title.append(f"\nflags: {', '.join(record.flags)}", style="yellow")
    return title


def _attempts_table(attempts: Sequence[Attempt]) -> Table:
    """One line per reply of stage 1: what was asked for, what came of it and why, its size."""
    names = ("reply", "outcome", "why", "similarity", "characters", "tokens in", "out")
    table = Table(box=None, header_style="dim", pad_edge=False)
    for at, name in enumerate(names):
        table.add_column(name, justify="right" if at > 2 else "left")
    for attempt in attempts:
        report, usage = attempt.report, attempt.usage
        table.add_row(
            f"{attempt.purpose} {attempt.number}",
            Text(attempt.outcome, "" if attempt.outcome == "accepted" else "yellow"),
            Text(printable(report.reason or "") if report else ""),
            _similarity(report),
            f"{attempt.reply_chars:,}",
            f"{usage.prompt_tokens:,}",
            f"{usage.completion_tokens:,}",
        )
    return table


def _similarity(report: MatchReport | None) -> str:
    """What the report measured: the worst pair's likeness, or the share of aligned words."""
    if report is None:
        return ""
    measured = report.fidelity if report.similarity is None else report.similarity
    return "" if measured is None else f"{measured:.3f}"


def _steps_table(record: Record) -> Table:
    """One line per source step: number, where it went, surprisal, text."""
    table = Table("step", "stage", "nats", "text", box=None, header_style="dim", pad_edge=False)
    if record.kept_steps is None:
        table.add_row("", "LLM text", "", Text(printable(record.pruned_cot)))
        return table
    kept = set(record.kept_steps)
    place = {step: at for at, step in enumerate(record.coarse_kept)}
    scores: tuple[float | None, ...] = ()
    if record.fine is not None:
        scores = record.fine.scored.scores.get(record.config.score, ())
    for step, text in enumerate(map(printable, record.source_steps)):
        score = scores[place[step]] if step in place and scores else None
        nats = "" if score is None else f"{score:.2f}"
        if step in kept:
            table.add_row(str(step), "kept", nats, Text(text))
        else:
            stage = "surprisal" if step in place else "anchor"
            style = "dim red" if stage == "anchor" else "dim yellow"
            table.add_row(str(step), Text(f"− {stage}", style), nats, Text(text, f"strike {style}"))
    return table


def method_table() -> Table:
    """The rows of `asap.methods`."""
    table = Table("method", "kind", "stages", "what it does", box=None, header_style="dim")
    for row in METHODS.values():
        table.add_row(row.name, row.kind, " → ".join(row.stages) or "-", row.summary)
    return table
