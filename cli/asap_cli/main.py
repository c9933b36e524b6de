"""The `asap` command: options in, one call each, errors as one sentence and an exit code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from asap.config import ScoreName
from asap.errors import AsapError, InvalidInput
from asap.steps import Split
from asap.train_config import TrainConfig
from asap_cli import job_kinds  # noqa: F401 - adds its commands to those of `asap jobs`
from asap_cli.deploy_command import deploy
from asap_cli.eval_commands import eval_app
from asap_cli.jobs import jobs_app
from asap_cli.keys import keys_app
from asap_cli.models import models_app
from asap_cli.options import (
    Device,
    Method,
    PruneOptions,
    read_config,
)
from asap_runtime.demo_model import DEMO
from asap_runtime.layouts import Layout
from asap_runtime.problems import problem_of
from asap_runtime.schemas import Schema

app = typer.Typer(
    name="asap",
    help="Compress chains of thought: anchor-guided pruning, then first-token surprisal.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

OutPath = Annotated[
    Path, typer.Option("--out", "-o", help="Output: .jsonl, .jsonl.gz or .parquet.")
]


@app.command()
def prune(
    source: Annotated[
        str,
        typer.Argument(
            metavar="IN", help="JSONL, JSONL.gz, Parquet, or a hub name owner/name[:split]."
        ),
    ],
    out: OutPath,
    method: Annotated[Method, typer.Option(help="Pruning method.")] = "asap",
    preset: Annotated[
        str, typer.Option(help="default, paper (as published) or repo (as the authors' scripts).")
    ] = "default",
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Token budget of each CoT \\[default: 4096].", show_default=False),
    ] = None,
    keep_ratio: Annotated[
        float | None, typer.Option(help="Instead: share of each CoT's tokens to keep.")
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(help="Stage 1: rewrite (the paper's) or select (numbers of steps)."),
    ] = None,
    split: Annotated[
        Split | None, typer.Option(help="Where steps end: safe, code or paper.")
    ] = None,
    score: Annotated[
        ScoreName | None, typer.Option(help="Stage 2: which score ranks steps.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other knob of the configuration."),
    ] = None,
    anchor: Annotated[
        str | None,
        typer.Option(help="llm or extractive \\[default: llm when --llm-model is given]."),
    ] = None,
    llm_base_url: Annotated[
        str | None,
        typer.Option(envvar="ASAP_LLM__BASE_URL", help="OpenAI-compatible server, with /v1."),
    ] = None,
    llm_model: Annotated[
        str | None, typer.Option(envvar="ASAP_LLM__MODEL", help="Model that prunes in stage 1.")
    ] = None,
    llm_concurrency: Annotated[int, typer.Option(min=1, help="LLM calls at the same time.")] = 32,
    llm_timeout_s: Annotated[
        float, typer.Option(min=0.1, help="Longest silence of one call.")
    ] = 600,
    llm_price: Annotated[
        str | None,
        typer.Option(
            metavar="IN,OUT", help="US dollars per million tokens in and out, for the cost."
        ),
    ] = None,
    scorer: Annotated[
        str,
        typer.Option(
            help="Causal LM: hub name, directory, demo, or auto (7B with a GPU, else demo)."
        ),
    ] = "auto",
    device: Annotated[Device, typer.Option(help="Where the scorer runs.")] = "auto",
    layout: Annotated[
        Layout, typer.Option(help="record (everything), messages (for SFT) or triple.")
    ] = "record",
    schema: Annotated[
        Schema | None, typer.Option(help="Fields of IN, when detection is wrong.")
    ] = None,
    cache_dir: Annotated[
        Path | None, typer.Option(envvar="ASAP_CACHE_DIR", help="Where LLM replies are kept.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask about the schema.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate tokens, cost and time; write nothing.")
    ] = False,
) -> None:
    """Prune the triples of IN into OUT. A killed run goes on where it stopped.

    The LLM's key is read from ASAP_LLM__API_KEY or OPENAI_API_KEY, never from an option.
    """
    from asap_cli.prune import run_prune

    options = PruneOptions(
        source=source,
        out=out,
        config=PruneOptions.build_config(
            assignments or [],
            method=method,
            preset=preset,
            max_tokens=max_tokens,
            keep_ratio=keep_ratio,
            protocol=protocol,
            split=split,
            score=score,
            anchor=anchor or ("llm" if llm_model else "extractive"),
        ),
        llm_base_url=llm_base_url,
        llm_model=llm_model,
        llm_concurrency=llm_concurrency,
        llm_timeout_s=llm_timeout_s,
        llm_price=PruneOptions.parse_price(llm_price),
        scorer=scorer,
        device=device,
        layout=layout,
        schema=schema,
        cache_dir=cache_dir,
        ask=not yes and schema is None,
    )
    raise typer.Exit(run_prune(options, dry_run=dry_run))


@app.command()
def rebudget(
    source: Annotated[str, typer.Argument(metavar="OUT", help="Records of `asap prune`.")],
    out: OutPath,
    max_tokens: Annotated[int | None, typer.Option(help="The new token budget.")] = None,
    keep_ratio: Annotated[
        float | None, typer.Option(help="Instead: share of tokens to keep.")
    ] = None,
    layout: Annotated[Layout, typer.Option(help="record, messages or triple.")] = "record",
) -> None:
    """Prune again from the stored scores, with no LLM and no model."""
    from asap_cli.rebudget import run_rebudget

    raise typer.Exit(run_rebudget(source, out, max_tokens, keep_ratio, layout))


@app.command()
def train(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="DATA", help="Records, chats, triples or prompts with completions, one a line."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the trained model.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Model to start from: hub name or directory "
            "\\[default: the paper's 7B; with --preset demo the shipped demo model]."
        ),
    ] = None,
    preset: Annotated[
        str, typer.Option(help="paper (Appendix A), or demo: a few hundred steps on a CPU.")
    ] = "paper",
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other knob of the recipe."),
    ] = None,
    common_with: Annotated[
        list[Path] | None,
        typer.Option(metavar="DATA", help="Another method's data: train on common ids alone."),
    ] = None,
    preview: Annotated[
        bool, typer.Option("--preview", help="Show which tokens carry loss; start nothing.")
    ] = False,
    preflight: Annotated[
        bool, typer.Option("--preflight", help="One real step: does it fit, how long, what cost.")
    ] = False,
    price: Annotated[
        float | None, typer.Option(min=0, metavar="USD", help="Of a device and hour.")
    ] = None,
) -> None:
    """Fine-tune a model on DATA, on this machine. A killed run goes on where it stopped."""
    from asap_cli.train import TrainOptions, run_preflight, run_preview, run_train
    from asap_runtime.model_files import DEFAULT_MODEL

    config = read_config(TrainConfig, assignments or [], preset=preset)
    if base is None:
        base = DEMO if preset == "demo" else DEFAULT_MODEL
    options = TrainOptions(source, out, base, config, tuple(common_with or ()), price)
    if preview or preflight:
        raise typer.Exit((run_preview if preview else run_preflight)(options))
    if out is None:
        raise InvalidInput("--out is needed, unless --preview or --preflight is asked for")
    raise typer.Exit(run_train(options))


@app.command()
def show(
    source: Annotated[str, typer.Argument(metavar="OUT", help="Records of `asap prune`.")],
    id: Annotated[
        str | None,
        typer.Option("--id", help="Record to show, or the start of its id \\[default: first]."),
    ] = None,
) -> None:
    """Print one trace: kept steps, dropped steps struck through, stage and surprisal of each."""
    from asap_cli.show import run_show

    run_show(source, id, Console())


@app.command()
def methods() -> None:
    """List the pruning methods."""
    from asap_cli.show import method_table

    Console().print(method_table())


Host = Annotated[str | None, typer.Option(help="Address \\[default: 127.0.0.1].")]
Port = Annotated[int | None, typer.Option(help="Port \\[default: 8000].")]


@app.command()
def serve(host: Host = None, port: Port = None) -> None:
    """Serve the HTTP API: gateway, all stages, queue and database in one process."""
    from asap_cli.roles import STAGES
    from asap_cli.serve import run_server

    run_server(host, port, stages=STAGES)


@app.command()
def gateway(host: Host = None, port: Port = None) -> None:
    """Serve the HTTP API alone; workers do the work."""
    from asap_cli.serve import run_server

    run_server(host, port, stages=())


@app.command()
def worker(
    stage: Annotated[str, typer.Argument(help="anchor, surprisal, trainer, generate or grade.")],
) -> None:
    """Work on one stage until SIGTERM."""
    from asap_cli.worker import run_worker

    run_worker(stage)


app.command()(deploy)


@app.command()
def config(
    example: Annotated[
        bool, typer.Option("--example", help="Print all settings with their defaults instead.")
    ] = False,
) -> None:
    """Print the effective settings, secrets as stars."""
    from asap_cli.env_example import env_example
    from asap_cli.roles import effective_settings

    typer.echo(env_example() if example else effective_settings(), nl=not example)


db_app = typer.Typer(help="The database.", no_args_is_help=True)
app.add_typer(db_app, name="db")


@db_app.command()
def upgrade() -> None:
    """Bring the database to the newest schema."""
    from asap_cli.roles import upgrade_database

    upgrade_database()


@db_app.command("wait")
def wait_for_database(
    timeout: Annotated[float, typer.Option(min=0, help="Longest wait, in seconds.")] = 600,
) -> None:
    """Wait until the database is there and has the schema that this release needs."""
    from asap_cli.roles import wait_for_schema

    wait_for_schema(timeout)


app.add_typer(jobs_app, name="jobs")
app.add_typer(models_app, name="models")
app.add_typer(eval_app, name="eval")
app.add_typer(keys_app, name="keys")


def main() -> None:
    """Entry point: an AsapError becomes one sentence on stderr and its exit code."""
    try:
        app()
    except AsapError as error:
        problem = problem_of(error)
        Console(stderr=True).print(
            f"asap: {error.detail}", markup=False, highlight=False, soft_wrap=True
        )
        sys.exit(problem.exit_code)


if __name__ == "__main__":
    main()
