"""A report on the terminal: what each model reached, and each comparison with its tests."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from asap.report import Report
from asap.report_markdown import format_p
from asap.significance import Interval
from asap_cli.answers import one_line

__all__ = ["comparison_table", "report_table"]


def report_table(report: Report) -> Table:
    """One row for each model, benchmark, budget and way to take the code; what is missing below."""
    table = _table("model", "benchmark")
    for name in ("budget", "code", "tasks", "passed", "Acc %", "95 %", "Tok", "cut", "Lat s"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.rows:
        table.add_row(
            Text(one_line(row.model)),
            Text(one_line(row.benchmark)),
            f"{row.budget:,}",
            row.extraction,
            f"{row.tasks:,}",
            f"{row.passed:,}",
            f"{row.accuracy:.2f}",
            _interval(row.interval, 1),
            f"{row.tokens:,.0f}",
            f"{100 * row.truncated:.0f} %",
            f"{row.latency_batch_s:.2f}",
        )
    if report.incomplete:
        table.caption = Text("\n".join(one_line(sentence) for sentence in report.incomplete))
        table.caption_justify = "left"
    return table


def comparison_table(report: Report) -> Table:
    """The candidate against each baseline, on the tasks that both were scored on."""
    table = _table("baseline", "benchmark")
    head = ("budget", "code", "tasks", "only it", "only baseline", "Acc difference", "McNemar p")
    for name in (*head, "Tok difference", "kept", "Wilcoxon p"):
        table.add_column(name, justify="right", no_wrap=True)
    for c in report.comparisons:
        table.add_row(
            Text(one_line(c.baseline)),
            Text(one_line(c.benchmark)),
            f"{c.budget:,}",
            c.extraction,
            f"{c.tasks:,}",
            f"{c.only_candidate:,}",
            f"{c.only_baseline:,}",
            f"{c.accuracy.mean:+.2f} ({_interval(c.accuracy, 1)})",
            format_p(c.mcnemar_p_holm),
            f"{c.tokens.mean:+,.0f} ({_interval(c.tokens, 0)})",
            f"{100 * c.kept_ratio:.1f} %",
            format_p(c.tokens_p_holm),
        )
    table.caption = Text(
        f"{one_line(report.candidate or '')} against the others; p corrected for their number"
    )
    table.caption_justify = "left"
    return table


def _table(*words: str) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for word in words:
        table.add_column(word, no_wrap=True)
    return table


def _interval(interval: Interval | None, digits: int) -> str:
    if interval is None:
        return "-"
    return f"{interval.low:.{digits}f} to {interval.high:.{digits}f}"
