"""`asap jobs train | evaluate | report`: the jobs that make and measure models, on a server."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer
from pydantic import BaseModel, JsonValue

from asap.errors import InvalidInput
from asap.eval_config import EvalConfig
from asap.train_config import TrainConfig
from asap_cli.eval_options import (
    Benchmarks,
    Budgets,
    Extractions,
    Limit,
    Preset,
    Samples,
    Temperature,
    eval_values,
)
from asap_cli.jobs import jobs_app
from asap_cli.options import read_config
from asap_cli.server_commands import (
    HERE,
    Follow,
    JobId,
    Server,
    announce,
    open_client,
    print_table,
    say,
)

if TYPE_CHECKING:
    from asap_cli.client import JobsClient

__all__ = ["JOB_ID"]

JOB_ID = re.compile(r"[0-9a-f]{32}")
Knobs = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any other knob of the configuration."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print what the job would take; submit nothing.")
]


@jobs_app.command()
def train(
    source: Annotated[
        str,
        typer.Argument(metavar="DATA", help="An ended prune job, or a URI of the blob store."),
    ],
    base: Annotated[
        str, typer.Option(help="Model to start from: hub name, or NAME@V of the registry.")
    ],
    model: Annotated[str, typer.Option(help="Name of the result in the registry.")],
    preset: Annotated[
        str, typer.Option(help="paper (Appendix A), or demo: a few hundred steps on a CPU.")
    ] = "paper",
    assignments: Knobs = None,
    common_with: Annotated[
        list[str] | None,
        typer.Option(metavar="DATA", help="Another method's data: train on common ids alone."),
    ] = None,
    dry_run: DryRun = False,
    follow: Follow = False,
    server: Server = HERE,
) -> None:
    """Fine-tune a model on a job's records and print the new job's id."""
    config = _given(TrainConfig, assignments or [], {"preset": preset})
    origin = "job" if JOB_ID.fullmatch(source) else "dataset"
    body: dict[str, JsonValue] = {
        "kind": "train",
        origin: source,
        "base": base,
        "model": model,
        "config": config,
        "common_with": list[JsonValue](common_with or []),
    }
    with open_client(server) as client:
        _start(client, body, f"training of {model} submitted to {client.server}", dry_run, follow)


@jobs_app.command()
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Name or NAME@V of the registry, or hub name.")
    ],
    benchmark: Benchmarks = None,
    budget: Budgets = None,
    limit: Limit = None,
    samples: Samples = None,
    temperature: Temperature = None,
    extraction: Extractions = None,
    preset: Preset = "default",
    assignments: Knobs = None,
    dry_run: DryRun = False,
    follow: Follow = False,
    server: Server = HERE,
) -> None:
    """Ask a model benchmarks, grade its programs, and print the new job's id."""
    values = eval_values(benchmark, budget, limit, samples, temperature, extraction, preset)
    config = _given(EvalConfig, assignments or [], values)
    body: dict[str, JsonValue] = {"kind": "evaluate", "model": model, "config": config}
    with open_client(server) as client:
        _start(client, body, f"evaluation of {model} submitted to {client.server}", dry_run, follow)


@jobs_app.command()
def report(
    job_id: JobId,
    format: Annotated[
        Literal["table", "json", "markdown", "html"], typer.Option(help="What to print.")
    ] = "table",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write instead of stdout.")
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Also while it runs, of what is done.")
    ] = False,
    server: Server = HERE,
) -> None:
    """Print what an evaluation came to."""
    if format == "table" and out is not None:
        raise InvalidInput("a table is for the terminal; name --format json, markdown or html")
    with open_client(server) as client:
        wanted = "markdown" if format == "markdown" else "json"
        text = client.report(job_id, wanted, partial=partial)
    if format == "table":
        from asap.report import Report
        from asap_cli.eval_views import report_table

        print_table(report_table(Report.model_validate_json(text)))
        return
    if format == "html":
        from asap.report import Report
        from asap_evaluator.report_html import render_html

        text = render_html(Report.model_validate_json(text))
    if out is None:
        typer.echo(text, nl=not text.endswith("\n"))
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"{str(out)!r} cannot be written: {error.strerror}") from error


def _given(
    kind: type[BaseModel], assignments: Sequence[str], values: Mapping[str, object]
) -> JsonValue:
    """Only what was asked for, checked before a byte is sent."""
    checked = read_config(kind, assignments, **values)
    names = {name for name, value in values.items() if value is not None}
    names |= {assignment.partition("=")[0] for assignment in assignments}
    return cast("JsonValue", checked.model_dump(mode="json", include=names))


def _start(
    client: JobsClient, body: Mapping[str, JsonValue], what: str, dry_run: bool, follow: bool
) -> None:
    if dry_run:
        from asap_cli.tables import plan_table

        print_table(plan_table(client.plan(body)))
        say("an estimate, not a promise; nothing was submitted")
        return
    announce(client, client.start(body), what, follow)
