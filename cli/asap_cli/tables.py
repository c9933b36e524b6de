"""What a server tells of jobs, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from rich.table import Table
from rich.text import Text

from asap.config import PruneConfig
from asap_cli.answers import FINAL, Estimate, Job, one_line
from asap_cli.watch import cost_of

__all__ = ["estimate_table", "facts_table", "jobs_table"]


def jobs_table(jobs: Sequence[Job]) -> Table:
    """One row for each job."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("id", "phase", "created"):
        table.add_column(name, no_wrap=True)
    for name in ("done", "failed"):
        table.add_column(name, justify="right", no_wrap=True)
    for job in jobs:
        words = (Text(one_line(word)) for word in (job.id, job.phase, _time(job.created_at)))
        done = f"{job.items(*FINAL):,}/{job.total:,}"
        table.add_row(*words, done, f"{job.items('failed'):,}")
    return table


def facts_table(job: Job) -> Table:
    """The job's facts, what its configuration changes, and its items by stage and status."""
    table = _facts()
    table.add_row("id", Text(one_line(job.id)))
    table.add_row("phase", Text(one_line(job.phase)))
    table.add_row("created", _time(job.created_at))
    if job.finished_at is not None:
        seconds = job.finished_at - job.created_at
        table.add_row("finished", f"{_time(job.finished_at)}, after {seconds:.1f} s")
    usual = PruneConfig().model_dump(mode="json")
    changed = {name: v for name, v in job.config.items() if v != usual.get(name)}
    told = {"method": job.config.get("method"), **changed}
    pairs = ", ".join(f"{name}={value}" for name, value in told.items())
    table.add_row("config", Text(one_line(pairs)))
    if (cost := cost_of(job)) is not None:
        table.add_row("cost", cost)
    table.add_row("items", f"{job.total:,}")
    for count in job.counts:
        where = Text(one_line(f"{count.stage or 'no stage'}, {count.status}"))
        table.add_row(where, f"{count.items:,}")
    for problem in job.problems:
        table.add_row("problem", Text(one_line(f"{problem.code}: {problem.detail}")))
    return table


def estimate_table(planned: Estimate) -> Table:
    """What a job would take."""
    table = _facts()
    for name, count in (
        ("records", planned.records),
        ("bad lines", planned.bad_lines),
        ("CoT tokens", planned.cot_tokens),
        ("LLM calls", planned.llm_calls),
        ("LLM tokens in", planned.prompt_tokens),
        ("LLM tokens out", planned.completion_tokens),
        ("scored tokens", planned.scored_tokens),
    ):
        table.add_row(name, f"{count:,}")
    known = planned.cost_usd is not None
    table.add_row("cost", f"${planned.cost_usd:,.4f}" if known else "unknown: no prices are set")
    table.add_row("counted by", Text(one_line(planned.tokenizer)))
    return table


def _facts() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    return table


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")
