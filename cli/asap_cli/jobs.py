"""`asap jobs`: the commands that talk to a server, one call each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer
from pydantic import JsonValue
from rich.console import Console

from asap.errors import InvalidInput
from asap_cli.options import Method, PruneOptions
from asap_cli.server_commands import (
    HERE,
    Follow,
    JobId,
    Server,
    announce,
    follow_job,
    open_client,
    print_table,
    say,
)
from asap_runtime.layouts import Layout

if TYPE_CHECKING:
    from asap_cli.answers import Estimate

__all__ = ["jobs_app"]

jobs_app = typer.Typer(
    help="Jobs on a server: submit, follow, download.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

MaxTokens = Annotated[int | None, typer.Option(help="Token budget of each CoT.")]
KeepRatio = Annotated[
    float | None, typer.Option(help="Instead: share of each CoT's tokens to keep.")
]
Priority = Literal["batch", "background"]
MONTH_S = 30 * 24 * 3600


@jobs_app.command()
def submit(
    source: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSONL, JSONL.gz or Parquet of triples.")
    ],
    method: Annotated[Method | None, typer.Option(help="Pruning method.")] = None,
    max_tokens: MaxTokens = None,
    keep_ratio: KeepRatio = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other knob of the configuration."),
    ] = None,
    cost_cap: Annotated[
        float | None,
        typer.Option(
            metavar="USD", min=1e-6, max=1e9, help="LLM calls of the job stop at this sum."
        ),
    ] = None,
    deadline: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", min=1, max=MONTH_S, help="Items that are not done by then fail."
        ),
    ] = None,
    webhook: Annotated[
        str | None, typer.Option(metavar="URL", help="https address, told when the job has ended.")
    ] = None,
    priority: Annotated[
        Priority | None, typer.Option(help="background goes after all batch \\[default: batch].")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what the job would take; submit nothing.")
    ] = False,
    follow: Follow = False,
    server: Server = HERE,
) -> None:
    """Submit FILE and print the job's id. What no option says, the server decides."""
    knobs = {"method": method, "max_tokens": max_tokens, "keep_ratio": keep_ratio}
    given: dict[str, JsonValue] = {
        "cost_cap_usd": cost_cap,
        "deadline_s": deadline,
        "webhook": webhook,
        "priority": priority,
    }
    options: dict[str, JsonValue] = {"config": _config(assignments or [], knobs)}
    options |= {name: value for name, value in given.items() if value is not None}
    with open_client(server) as client:
        if dry_run:
            _print_estimate(client.estimate(source, options))
            return
        job = client.submit(source, options)
        announce(client, job, f"{source.name} submitted to {client.server}", follow)


@jobs_app.command()
def rebudget(
    job_id: JobId,
    max_tokens: MaxTokens = None,
    keep_ratio: KeepRatio = None,
    follow: Follow = False,
    server: Server = HERE,
) -> None:
    """Submit an ended job's records again at another target; its scores are used, no model."""
    if (max_tokens is None) == (keep_ratio is None):
        raise InvalidInput("give exactly one of --max-tokens and --keep-ratio")
    config = _config([], {"max_tokens": max_tokens, "keep_ratio": keep_ratio})
    with open_client(server) as client:
        job = client.start({"scores_from": job_id, "config": config})
        announce(client, job, f"scores of job {job_id} are used again", follow)


@jobs_app.command()
def watch(job_id: JobId, server: Server = HERE) -> None:
    """Follow a job to its end. Exit code 0, or 65 when items failed or the job was stopped."""
    with open_client(server) as client:
        raise typer.Exit(follow_job(client, client.job(job_id)))


@jobs_app.command("list")
def list_jobs(
    limit: Annotated[int, typer.Option(min=1, max=500, help="Most jobs to list.")] = 50,
    server: Server = HERE,
) -> None:
    """List the jobs, newest first."""
    from asap_cli.tables import jobs_table

    with open_client(server) as client:
        page = client.jobs(limit)
    print_table(jobs_table(page.jobs))
    if page.next_cursor is not None:
        say(f"these are the newest {limit}; --limit shows more")


@jobs_app.command()
def show(job_id: JobId, server: Server = HERE) -> None:
    """Print a job's facts, its items by stage and status, and why items failed."""
    from asap_cli.tables import facts_table
    from asap_cli.watch import Failures, print_failures

    with open_client(server) as client:
        job = client.job(job_id)
        found = Failures.of(job, client.items(job_id)) if job.items("failed") else None
    console = Console()
    console.print(facts_table(job), highlight=False)
    if found is not None:
        print_failures(console, job, found)


@jobs_app.command()
def cancel(job_id: JobId, server: Server = HERE) -> None:
    """Stop a job; safe to repeat. What is done stays downloadable."""
    from asap_cli.watch import print_end

    with open_client(server) as client:
        print_end(Console(), client.cancel(job_id))


@jobs_app.command()
def retry(job_id: JobId, server: Server = HERE) -> None:
    """Run the failed items of a finished job again; bad lines stay failed."""
    with open_client(server) as client:
        before, after = client.job(job_id), client.retry(job_id)
    again = before.items("failed") - after.items("failed")
    if again > 0:
        say(f"{again:,} items run again; `asap jobs watch {job_id}` follows them")
    elif before.phase != "done":
        say(
            f"nothing runs again: the job is {before.phase}, only a job that is done can be retried"
        )
    else:
        say("nothing runs again: no item of the job failed in a stage")


@jobs_app.command()
def delete(job_id: JobId, server: Server = HERE) -> None:
    """Stop a job and delete it with its results."""
    with open_client(server) as client:
        client.delete(job_id)
    say(f"job {job_id} is deleted")


@jobs_app.command()
def download(
    job_id: JobId,
    out: Annotated[Path, typer.Option("--out", "-o", help="Output: .jsonl or .parquet.")],
    layout: Annotated[
        Layout, typer.Option(help="record (everything), messages (for SFT) or triple.")
    ] = "record",
    server: Server = HERE,
) -> None:
    """Write a job's records to OUT in input order, also while it runs."""
    from asap_cli.answers import FINAL

    if not out.name.lower().endswith((".jsonl", ".ndjson", ".parquet")) or out.is_dir():
        raise InvalidInput(f"OUT must be a file that ends in .jsonl or .parquet, not {str(out)!r}")
    with open_client(server) as client:
        job = client.job(job_id)
        records = client.download(job_id, out, layout)
    rest = job.total - job.items(*FINAL)
    note = f"; {rest:,} items were not finished" if rest else ""
    say(f"{records:,} records written to {out}{note}")


def _config(assignments: Sequence[str], given: Mapping[str, object]) -> dict[str, JsonValue]:
    """Only what was asked for, checked before a byte is sent."""
    values = {"method": "asap"} | {name: v for name, v in given.items() if v is not None}
    checked = PruneOptions.build_config(assignments, **values)
    names = {name for name, value in given.items() if value is not None}
    names |= {assignment.partition("=")[0] for assignment in assignments}
    return cast("dict[str, JsonValue]", checked.model_dump(mode="json", include=names))


def _print_estimate(planned: Estimate) -> None:
    from asap_cli.tables import estimate_table

    Console().print(estimate_table(planned), highlight=False)
    say("an estimate, not a promise; nothing was submitted")
