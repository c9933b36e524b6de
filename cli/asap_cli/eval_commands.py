"""`asap eval`: evaluations on this machine, without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from asap.errors import InvalidInput
from asap.eval_config import EvalConfig
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
from asap_cli.options import read_config
from asap_cli.server_commands import HERE, Server

__all__ = ["eval_app"]

eval_app = typer.Typer(
    help="Evaluate models on this machine: ask, grade, compare.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of items and reports.")]
Data = Annotated[
    Path | None,
    typer.Option(help="Folder with the benchmarks' files \\[default: ASAP_BENCHMARKS]."),
]
Knobs = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any other knob of the configuration."),
]


@eval_app.command()
def run(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Directory, hub name, or NAME@V of the registry.")
    ],
    out: Out,
    benchmark: Benchmarks = None,
    budget: Budgets = None,
    limit: Limit = None,
    samples: Samples = None,
    temperature: Temperature = None,
    extraction: Extractions = None,
    preset: Preset = "default",
    assignments: Knobs = None,
    data: Data = None,
    base_url: Annotated[
        str | None,
        typer.Option(help="A vLLM server that runs already, with /v1 \\[default: one is started]."),
    ] = None,
    served_model: Annotated[
        str | None, typer.Option(help="What that server calls the model \\[default: MODEL].")
    ] = None,
) -> None:
    """Ask MODEL benchmarks and grade its programs. A killed run goes on where it stopped."""
    from asap_cli.evaluate import EvalOptions, run_eval

    if served_model is not None and base_url is None:
        raise InvalidInput("--served-model needs --base-url")
    values = eval_values(benchmark, budget, limit, samples, temperature, extraction, preset)
    config = read_config(EvalConfig, assignments or [], **values)
    options = EvalOptions(model, config, out, data, base_url, served_model)
    raise typer.Exit(run_eval(options))


@eval_app.command()
def grade(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SAMPLES", help="JSONL with task_id and completion, perhaps budget and tokens."
        ),
    ],
    out: Out,
    benchmark: Benchmarks = None,
    extraction: Extractions = None,
    assignments: Knobs = None,
    name: Annotated[
        str | None, typer.Option(help="Of the model \\[default: the file's name].")
    ] = None,
    data: Data = None,
) -> None:
    """Grade completions that are there already; no model is needed."""
    from asap_cli.evaluate import EvalOptions, run_grade

    values = eval_values(benchmark, None, None, None, None, extraction, None)
    config = read_config(EvalConfig, assignments or [], **values)
    options = EvalOptions(name or source.name.partition(".")[0], config, out, data, samples=source)
    raise typer.Exit(run_grade(options))


@eval_app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN RUN…", help="Folders of `asap eval`, or ids of jobs."),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for report.json, .md and .html.")
    ] = None,
    candidate: Annotated[
        str | None,
        typer.Option(
            metavar="RUN", help="Compared with each of the others \\[default: the first]."
        ),
    ] = None,
    server: Server = HERE,
) -> None:
    """Put evaluations side by side, with paired tests on the tasks that both were scored on."""
    from asap_cli.eval_compare import run_compare

    run_compare(runs, out, candidate, server)
