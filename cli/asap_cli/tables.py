"""What a server tells of jobs and models, as tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import datetime

from pydantic import BaseModel, JsonValue
from rich.table import Table
from rich.text import Text

from asap.config import PruneConfig
from asap.eval_config import EvalConfig
from asap.train_config import TrainConfig
from asap_cli.answers import FINAL, Estimate, Job, Model, Plan, one_line

__all__ = [
    "cost_of",
    "estimate_table",
    "facts_table",
    "jobs_table",
    "model_table",
    "models_table",
    "plan_table",
]

CONFIGS: dict[str, type[BaseModel]] = {
    "prune": PruneConfig,
    "train": TrainConfig,
    "evaluate": EvalConfig,
}


def jobs_table(jobs: Sequence[Job]) -> Table:
    """One row for each job."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("id", "kind", "phase", "created"):
        table.add_column(name, no_wrap=True)
    for name in ("done", "failed"):
        table.add_column(name, justify="right", no_wrap=True)
    for job in jobs:
        words = (Text(one_line(word)) for word in _job_words(job))
        done = f"{job.items(*FINAL):,}/{job.total:,}"
        table.add_row(*words, done, f"{job.items('failed'):,}")
    return table


def _job_words(job: Job) -> tuple[str, ...]:
    return job.id, job.kind, job.phase, _time(job.created_at)


def facts_table(job: Job) -> Table:
    """The job's facts, what its configuration changes, and its items by stage and status."""
    table = _facts()
    table.add_row("id", Text(one_line(job.id)))
    if job.kind != "prune":
        table.add_row("kind", Text(one_line(job.kind)))
    table.add_row("phase", Text(one_line(job.phase)))
    table.add_row("created", _time(job.created_at))
    if job.finished_at is not None:
        seconds = job.finished_at - job.created_at
        table.add_row("finished", f"{_time(job.finished_at)}, after {seconds:.1f} s")
    pairs = ", ".join(f"{name}={value}" for name, value in _told(job).items())
    table.add_row("config", Text(one_line(pairs)))
    for name, text in _of_kind(job):
        table.add_row(name, Text(one_line(text)))
    if (cost := cost_of(job)) is not None:
        table.add_row("cost", cost)
    table.add_row("items", f"{job.total:,}")
    for count in job.counts:
        where = Text(one_line(f"{count.stage or 'no stage'}, {count.status}"))
        table.add_row(where, f"{count.items:,}")
    for problem in job.problems:
        table.add_row("problem", Text(one_line(f"{problem.code}: {problem.detail}")))
    return table


def _told(job: Job) -> dict[str, JsonValue]:
    """What of the configuration is not the default of its kind."""
    kind = CONFIGS.get(job.kind)
    if kind is None:
        return dict(job.config)
    usual = kind().model_dump(mode="json")
    changed = {name: value for name, value in job.config.items() if value != usual.get(name)}
    return {"method": job.config.get("method"), **changed} if job.kind == "prune" else changed


def _of_kind(job: Job) -> Iterator[tuple[str, str]]:
    """What a training or an evaluation says of itself."""
    if (train := job.train) is not None:
        yield "base", train.base
        version = "" if train.version is None else f"@{train.version}"
        yield "model", f"{train.model}{version}"
        if (progress := train.progress) is not None:
            steps = f" {progress.step}/{progress.total_steps}" if progress.total_steps else ""
            yield "progress", f"{progress.phase}{steps}"
    if (evaluation := job.evaluation) is not None:
        yield "model", evaluation.model
        yield (
            "questions",
            f"{evaluation.questions:,}, {evaluation.generated:,} generated, "
            f"{evaluation.done:,} done",
        )


def cost_of(job: Job) -> str | None:
    """What LLM calls cost so far, and the cap; None when neither money nor a cap is known."""
    if not job.cost_usd and job.cost_cap_usd is None:
        return None
    cap = "" if job.cost_cap_usd is None else f" of at most ${job.cost_cap_usd:,.2f}"
    return f"${job.cost_usd:,.4f}{cap}"


def plan_table(planned: Plan) -> Table:
    """What a job of another kind than prune would take, in the server's own words."""
    table = _facts()
    for name, value in planned.root.items():
        text = f"{value:,}" if isinstance(value, int | float) else json.dumps(value)
        table.add_row(Text(one_line(name.replace("_", " "))), Text(one_line(text.strip('"'))))
    return table


def models_table(models: Sequence[Model]) -> Table:
    """One row for each version."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("model", "stage", "created", "base"):
        table.add_column(name, no_wrap=True)
    for model in models:
        words = (f"{model.name}@{model.version}", model.stage, _time(model.created_at), model.base)
        table.add_row(*(Text(one_line(word)) for word in words))
    return table


def model_table(model: Model) -> Table:
    """A version's facts and the figures of its training and of its evaluations."""
    table = _facts()
    for name, text in {
        "model": f"{model.name}@{model.version}",
        "stage": model.stage,
        "created": _time(model.created_at),
        "base": model.base,
        "job": model.job_id,
        "sha256": model.manifest_sha256,
        **{name: json.dumps(value) for name, value in sorted(model.meta.items())},
    }.items():
        table.add_row(Text(one_line(name)), Text(one_line(text)))
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
