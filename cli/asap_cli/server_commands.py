"""What the commands that talk to a server share: its address, its client, following a job."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from asap.errors import InvalidInput, Overloaded
from asap_runtime.problems import INTERRUPTED, PROBLEMS

if TYPE_CHECKING:
    from asap_cli.answers import Job
    from asap_cli.client import JobsClient

__all__ = [
    "DATA_ERROR",
    "HERE",
    "Follow",
    "JobId",
    "Server",
    "announce",
    "api_key",
    "follow_job",
    "open_client",
    "print_table",
    "say",
]

Server = Annotated[str, typer.Option(envvar="ASAP_SERVER", help="URL of the server.")]
JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's id.")]
Follow = Annotated[bool, typer.Option("--watch", help="Follow the job to its end.")]
HERE = "http://127.0.0.1:8000"
PIPED_WIDTH = 200
DATA_ERROR = PROBLEMS[InvalidInput].exit_code


def api_key() -> str | None:
    """From the environment alone: an option would stand in the shell's history."""
    return os.environ.get("ASAP_API_KEY")


def open_client(server: str) -> JobsClient:
    """A client of the server's jobs."""
    from asap_cli.client import JobsClient

    return JobsClient.open(server, key=api_key())


def announce(client: JobsClient, job: Job, what: str, follow: bool) -> None:
    """Tell of a new job, and follow it if that was asked for."""
    typer.echo(job.id)
    say(what if follow else f"{what}; `asap jobs watch {job.id}` follows it")
    if follow:
        raise typer.Exit(follow_job(client, job))


def follow_job(client: JobsClient, job: Job) -> int:
    """Show the job until it has ended; the exit code."""
    from asap_cli.watch import Failures, open_progress, print_end, print_failures

    console = Console(stderr=True)
    try:
        with open_progress(console, job) as progress:
            for state in client.follow(job.id):
                progress.show(state)
                job = state
        print_end(console, job)
        if job.kind == "evaluate" and job.phase == "done":
            _print_report(client, job, console)
        if job.items("failed"):
            print_failures(console, job, Failures.of(job, client.items(job.id)))
    except KeyboardInterrupt:
        say(
            f"job {job.id} goes on; `asap jobs watch {job.id}` follows it, "
            f"`asap jobs cancel {job.id}` stops it"
        )
        return INTERRUPTED
    return 0 if job.phase == "done" and not job.items("failed") else DATA_ERROR


def _print_report(client: JobsClient, job: Job, console: Console) -> None:
    from asap.report import Report
    from asap_cli.eval_views import report_table

    try:
        report = Report.model_validate_json(client.report(job.id, "json"))
    except Overloaded:
        say(f"the server is making other reports; `asap jobs report {job.id}` prints this one")
        return
    console.print(report_table(report), highlight=False)


def print_table(table: Table) -> None:
    """On stdout; what a program reads is never cut."""
    console = Console()
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    console.print(table, highlight=False)


def say(text: str) -> None:
    """A sentence for people, on stderr: stdout holds what scripts read."""
    from asap_cli.answers import one_line

    Console(stderr=True).print(one_line(text), markup=False, highlight=False, soft_wrap=True)
