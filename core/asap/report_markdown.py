"""A report as Markdown: the tables of the paper with what stands behind them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from asap.eval_config import benchmark_of
from asap.fences import wrap
from asap.metrics import MetricsRow
from asap.paper_tables import printed_for
from asap.report import Comparison, Report
from asap.significance import Interval

__all__ = ["format_p", "render_markdown"]

TIMES = (("first", "s"), ("per", "ms"))


def render_markdown(report: Report) -> str:
    """The whole report; equal reports give equal text."""
    parts = ["# Evaluation", *_incomplete(report)]
    for benchmark in dict.fromkeys(row.benchmark for row in report.rows):
        rows = [row for row in report.rows if row.benchmark == benchmark]
        parts += [f"## {benchmark_of(benchmark).title}", _metrics(rows), _behaviour(rows)]
        compared = [c for c in report.comparisons if c.benchmark == benchmark]
        if compared:
            parts += [f"{report.candidate} against the others, on common tasks:", _tests(compared)]
        if printed := printed_for(benchmark):
            parts += ["As the paper prints it:", _table(
                ["model", "method", "budget", "Acc %", "Tok", "Lat s"],
                (
                    [p.model, p.method, p.budget, f"{p.accuracy:.2f}", p.tokens, p.latency_s]
                    for p in printed
                ),
            )]  # fmt: skip
    if report.across:
        parts += [
            "## Over benchmarks",
            "One pair of accuracies for each benchmark, as the paper's test; few pairs say little.",
            _table(
                ["extraction", "baseline", "benchmarks", "p one-sided", "p two-sided"],
                (
                    [
                        a.extraction,
                        a.baseline,
                        len(a.benchmarks),
                        format_p(a.test.p_greater),
                        format_p(a.test.p_two_sided),
                    ]
                    for a in report.across
                ),
            ),
        ]
    if report.provenance:
        told = json.dumps(report.provenance, sort_keys=True, indent=1, ensure_ascii=False)
        parts += ["## Made with", wrap(told, "json")]
    return "\n\n".join(parts) + "\n"


def format_p(p: float) -> str:
    """Three decimals, or the order of what is smaller."""
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def _incomplete(report: Report) -> list[str]:
    if not report.incomplete:
        return []
    return ["**Incomplete:**", "\n".join(f"- {sentence}" for sentence in report.incomplete)]


def _metrics(rows: Iterable[MetricsRow]) -> str:
    return _table(
        ["model", "budget", "code", "tasks", "passed", "Acc %", "95 %", "Tok", "Lat s"],
        (
            [
                r.model,
                r.budget,
                r.extraction,
                r.tasks,
                r.passed,
                f"{r.accuracy:.2f}",
                _interval(r.interval),
                f"{r.tokens:.0f}",
                f"{r.latency_batch_s:.2f}",
            ]
            for r in rows
        ),
    )


def _behaviour(rows: Sequence[MetricsRow]) -> str:
    ks = sorted({k for r in rows for k in r.pass_at if k > 1})
    head = ["model", "budget", "code", "cut", "no code", "time-outs", "loops", "flagged", "flipped"]
    head += ["requests at once", "p50 s", "p95 s"]
    head += [f"{part} token {p} {unit}" for part, unit in TIMES for p in ("p50", "p95")]
    return _table(
        head + [f"pass@{k} %" for k in ks],
        (
            [
                r.model,
                r.budget,
                r.extraction,
                *(f"{100 * share:.1f} %" for share in (r.truncated, r.no_code)),
                *(f"{100 * share:.1f} %" for share in (r.timeouts, r.loops)),
                r.flagged,
                r.flipped,
                f"{r.concurrency:.1f}",
                f"{r.latency_p50_s:.2f}",
                f"{r.latency_p95_s:.2f}",
                *(_seconds(value) for value in (r.ttft_p50_s, r.ttft_p95_s)),
                *(_seconds(value, 1000) for value in (r.per_token_p50_s, r.per_token_p95_s)),
                *(f"{r.pass_at[k]:.2f}" if k in r.pass_at else "" for k in ks),
            ]
            for r in rows
        ),
    )


def _tests(comparisons: Iterable[Comparison]) -> str:
    head = ["baseline", "budget", "code", "tasks", "only it", "only baseline", "Acc difference"]
    head += ["McNemar p", "Holm", "tokens kept", "Tok difference", "Wilcoxon p", "Pratt p", "Holm"]
    return _table(
        head,
        (
            [
                c.baseline,
                c.budget,
                c.extraction,
                c.tasks,
                c.only_candidate,
                c.only_baseline,
                f"{c.accuracy.mean:+.2f} ({_interval(c.accuracy)})",
                format_p(c.mcnemar_p),
                format_p(c.mcnemar_p_holm),
                f"{100 * c.kept_ratio:.1f} %",
                f"{c.tokens.mean:+.0f} ({_interval(c.tokens, 0)})",
                format_p(c.tokens_wilcox.p_two_sided),
                format_p(c.tokens_pratt.p_two_sided),
                format_p(c.tokens_p_holm),
            ]
            for c in comparisons
        ),
    )


def _seconds(value: float | None, parts: int = 1) -> str:
    """Two digits behind the point, of so many parts of a second."""
    return "" if value is None else f"{parts * value:.2f}"


def _interval(interval: Interval | None, digits: int = 1) -> str:
    return "" if interval is None else f"{interval.low:.{digits}f} to {interval.high:.{digits}f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )
