"""`asap jobs`: the commands that talk to a server, one call each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from pydantic import JsonValue
from rich.console import Console
from rich.table import Table
from rich.text import Text

from asap.errors import InvalidInput
from asap_cli.options import Method, PruneOptions
from asap_runtime.layouts import Layout
from asap_runtime.problems import INTERRUPTED, PROBLEMS

if TYPE_CHECKING:
    from asap_cli.answers import Job
    from asap_cli.client import JobsClient

__all__ = ["jobs_app"]

jobs_app = typer.Typer(
    help="Jobs on a server: submit, follow, download.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Server = Annotated[str, typer.Option(envvar="ASAP_SERVER", help="URL of the server.")]
JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's id.")]
HERE = "http://127.0.0.1:8000"
PIPED_WIDTH = 200
DATA_ERROR = PROBLEMS[InvalidInput].exit_code


@jobs_app.command()
def submit(
    source: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSONL, JSONL.gz or Parquet of triples.")
    ],
    method: Annotated[Method | None, typer.Option(help="Pruning method.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Token budget of each CoT.")] = None,
    keep_ratio: Annotated[
        float | None, typer.Option(help="Instead: share of each CoT's tokens to keep.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other knob of the configuration."),
    ] = None,
    follow: Annotated[bool, typer.Option("--watch", help="Follow the job to its end.")] = False,
    server: Server = HERE,
) -> None:
    """Submit FILE and print the job's id. What no option says, the server decides."""
    given = {"method": method, "max_tokens": max_tokens, "keep_ratio": keep_ratio}
    config = _config(assignments or [], given)
    with _client(server) as client:
        job = client.submit(source, config)
        typer.echo(job.id)
        rest = "" if follow else f"; `asap jobs watch {job.id}` follows it"
        _say(f"{source.name} submitted to {client.server}{rest}")
        if follow:
            raise typer.Exit(_watch(client, job))


@jobs_app.command()
def watch(job_id: JobId, server: Server = HERE) -> None:
    """Follow a job to its end. Exit code 0, or 65 when items failed or the job was stopped."""
    with _client(server) as client:
        raise typer.Exit(_watch(client, client.job(job_id)))


@jobs_app.command("list")
def list_jobs(
    limit: Annotated[int, typer.Option(min=1, max=500, help="Most jobs to list.")] = 50,
    server: Server = HERE,
) -> None:
    """List the jobs, newest first."""
    from asap_cli.answers import FINAL, one_line

    with _client(server) as client:
        page = client.jobs(limit)
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("id", "phase", "created"):
        table.add_column(name, no_wrap=True)
    for name in ("done", "failed"):
        table.add_column(name, justify="right", no_wrap=True)
    for job in page.jobs:
        words = (Text(one_line(word)) for word in (job.id, job.phase, _time(job.created_at)))
        done = f"{job.items(*FINAL):,}/{job.total:,}"
        table.add_row(*words, done, f"{job.items('failed'):,}")
    console = Console()
    if not console.is_terminal:
        console.width = PIPED_WIDTH  # what a program reads is never cut
    console.print(table, highlight=False)
    if page.next_cursor is not None:
        _say(f"these are the newest {limit}; --limit shows more")


@jobs_app.command()
def show(job_id: JobId, server: Server = HERE) -> None:
    """Print a job's facts, its items by stage and status, and why items failed."""
    from asap_cli.watch import Failures, print_failures

    with _client(server) as client:
        job = client.job(job_id)
        found = Failures.of(job, client.items(job_id)) if job.items("failed") else None
    console = Console()
    console.print(_facts(job), highlight=False)
    if found is not None:
        print_failures(console, job, found)


@jobs_app.command()
def cancel(job_id: JobId, server: Server = HERE) -> None:
    """Stop a job; safe to repeat. What is done stays downloadable."""
    from asap_cli.watch import print_end

    with _client(server) as client:
        print_end(Console(), client.cancel(job_id))


@jobs_app.command()
def retry(job_id: JobId, server: Server = HERE) -> None:
    """Run the failed items of a finished job again; bad lines stay failed."""
    with _client(server) as client:
        before, after = client.job(job_id), client.retry(job_id)
    again = before.items("failed") - after.items("failed")
    if again > 0:
        _say(f"{again:,} items run again; `asap jobs watch {job_id}` follows them")
    elif before.phase != "done":
        _say(
            f"nothing runs again: the job is {before.phase}, only a job that is done can be retried"
        )
    else:
        _say("nothing runs again: no item of the job failed in a stage")


@jobs_app.command()
def delete(job_id: JobId, server: Server = HERE) -> None:
    """Stop a job and delete it with its results."""
    with _client(server) as client:
        client.delete(job_id)
    _say(f"job {job_id} is deleted")


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
    with _client(server) as client:
        job = client.job(job_id)
        records = client.download(job_id, out, layout)
    rest = job.total - job.items(*FINAL)
    note = f"; {rest:,} items were not finished" if rest else ""
    _say(f"{records:,} records written to {out}{note}")


def _client(server: str) -> JobsClient:
    from asap_cli.client import JobsClient

    return JobsClient.open(server)


def _config(assignments: Sequence[str], given: Mapping[str, object]) -> dict[str, JsonValue]:
    """Only what was asked for, checked before a byte is sent."""
    values = {"method": "asap"} | {name: v for name, v in given.items() if v is not None}
    checked = PruneOptions.build_config(assignments, **values)
    names = {name for name, value in given.items() if value is not None}
    names |= {assignment.partition("=")[0] for assignment in assignments}
    return cast("dict[str, JsonValue]", checked.model_dump(mode="json", include=names))


def _watch(client: JobsClient, job: Job) -> int:
    """Show the job until it has ended; the exit code."""
    from asap_cli.watch import Failures, JobProgress, print_end, print_failures, route_of

    console = Console(stderr=True)
    try:
        with JobProgress(console, route_of(job)) as progress:
            for state in client.follow(job.id):
                progress.show(state)
                job = state
        print_end(console, job)
        if job.items("failed"):
            print_failures(console, job, Failures.of(job, client.items(job.id)))
    except KeyboardInterrupt:
        _say(
            f"job {job.id} goes on; `asap jobs watch {job.id}` follows it, "
            f"`asap jobs cancel {job.id}` stops it"
        )
        return INTERRUPTED
    return 0 if job.phase == "done" and not job.items("failed") else DATA_ERROR


def _facts(job: Job) -> Table:
    """The job's facts, what its configuration changes, and its items by stage and status."""
    from asap.config import PruneConfig
    from asap_cli.answers import one_line
    from asap_cli.watch import cost_of

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
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


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _say(text: str) -> None:
    """A sentence for people, on stderr: stdout holds what scripts read."""
    from asap_cli.answers import one_line

    Console(stderr=True).print(one_line(text), markup=False, highlight=False, soft_wrap=True)
