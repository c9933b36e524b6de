"""A report as one HTML page that needs nothing else: no script, no request, drawings inline.

Completions are text of a model and stand escaped in the page, whose policy forbids scripts as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from asap.eval_config import Extraction, benchmark_of
from asap.metrics import MetricsRow
from asap.paper_tables import Printed, printed_for
from asap.report import Comparison, Difference, Report
from asap.report_markdown import format_p
from asap_evaluator.plots import Plot, make_plot

__all__ = ["Completion", "render_html"]

Completion = tuple[str, str, str, int, int]
"""Model, benchmark, task id, budget and number of a completion."""

MOST_SHOWN = 200
"""Differing tasks of one benchmark whose completions the page holds: those of the main extraction
and the largest budget first.
"""


@dataclass(frozen=True, slots=True)
class _Shown:
    """A differing task with its two completions."""

    difference: Difference
    anchor: str
    texts: tuple[tuple[str, str, str], ...]
    """Model, verdict and completion: the candidate's, then the baseline's."""


@dataclass(frozen=True, slots=True)
class _Section:
    """What the page says of one benchmark."""

    title: str
    rows: tuple[MetricsRow, ...]
    plots: tuple[Plot, ...]
    comparisons: tuple[Comparison, ...]
    shown: tuple[_Shown, ...]
    left_out: int
    printed: tuple[Printed, ...]


def render_html(report: Report, completions: Mapping[Completion, str] | None = None) -> str:
    """The page. `completions`: texts by name; those of differing tasks are shown, as far as they
    are given. Equal input gives equal text.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["p"] = format_p
    names = dict.fromkeys(row.benchmark for row in report.rows)
    page = environment.get_template("report.html.j2").render(
        report=report,
        sections=[
            _section(number, name, report, completions or {}) for number, name in enumerate(names)
        ],
        provenance=json.dumps(report.provenance, sort_keys=True, indent=1, ensure_ascii=False),
    )
    # A model may write half a surrogate pair, which no file can hold.
    return page.encode("utf-8", "replace").decode("utf-8")


def _section(
    number: int, name: str, report: Report, completions: Mapping[Completion, str]
) -> _Section:
    rows = tuple(row for row in report.rows if row.benchmark == name)
    differing = [d for d in report.differences if d.benchmark == name]
    differing.sort(key=lambda d: (d.extraction != rows[0].extraction, -d.budget))
    return _Section(
        title=benchmark_of(name).title,
        rows=rows,
        plots=_plots(report, name, rows[0].extraction),
        comparisons=tuple(c for c in report.comparisons if c.benchmark == name),
        shown=tuple(
            _shown(f"c{number}-{place}", difference, report, completions)
            for place, difference in enumerate(differing[:MOST_SHOWN])
        ),
        left_out=max(0, len(differing) - MOST_SHOWN),
        printed=tuple(printed_for(name)),
    )


def _plots(report: Report, name: str, extraction: Extraction) -> tuple[Plot, ...]:
    curves = [(model, report.curve(model, name, extraction)) for model in report.models]
    drawn = [(model, rows) for model, rows in curves if rows]

    def points(rows: Sequence[MetricsRow], field: str) -> list[tuple[float, float, str]]:
        return [(getattr(r, field), r.accuracy, f"{r.budget}: {r.cell}") for r in rows]

    return (
        make_plot(
            f"Accuracy against generated tokens ({extraction})",
            "mean generated tokens",
            "Acc %",
            [(model, points(rows, "tokens")) for model, rows in drawn],
        ),
        make_plot(
            f"Accuracy by budget ({extraction})",
            "budget, tokens",
            "Acc %",
            [(model, points(rows, "budget")) for model, rows in drawn],
        ),
    )


def _shown(
    anchor: str, difference: Difference, report: Report, completions: Mapping[Completion, str]
) -> _Shown:
    d = difference
    pair = ((report.candidate or "", d.candidate_verdict), (d.baseline, d.baseline_verdict))
    texts = []
    for model, verdict in pair:
        text = completions.get((model, d.benchmark, d.task_id, d.budget, d.number))
        if text is not None:
            texts.append((model, verdict, text))
    return _Shown(difference, anchor, tuple(texts))
