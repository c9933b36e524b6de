"""`asap eval compare`: folders of this machine and jobs of a server, side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from asap.errors import InvalidInput, UpstreamError
from asap.eval_items import EvalItem
from asap_cli.eval_folder import read_items, write_reports
from asap_cli.eval_reports import compare_runs, page_of
from asap_cli.eval_views import comparison_table, report_table
from asap_cli.job_kinds import JOB_ID
from asap_cli.server_commands import open_client, print_table, say

__all__ = ["run_compare"]


def run_compare(runs: Sequence[str], out: Path | None, candidate: str | None, server: str) -> None:
    """Print the tables, and write the reports where that was asked for."""
    if len(runs) < 2 or len(set(runs)) < len(runs):
        raise InvalidInput("name two runs or more, each once")
    if candidate is not None and candidate not in runs:
        raise InvalidInput(f"--candidate {candidate!r} is none of the runs")
    found = {run: _items(run, server) for run in runs}
    empty = [run for run, items in found.items() if not items]
    if empty:
        raise InvalidInput(f"{empty[0]!r} holds nothing yet")
    names = _names(found)
    by_name = {names[run]: items for run, items in found.items()}
    report = compare_runs(by_name, names[candidate or runs[0]])
    print_table(report_table(report))
    if report.comparisons:
        print_table(comparison_table(report))
    else:
        say("nothing to compare: no benchmark, budget and extraction is in both")
    if out is not None:
        write_reports(out, report, page_of(report, by_name))
        say(f"report.json, report.md and report.html written to {out}")


def _items(run: str, server: str) -> list[EvalItem]:
    if Path(run).is_dir() or not JOB_ID.fullmatch(run):
        return read_items(Path(run))
    with open_client(server) as client:
        job = client.job(run)
        if job.kind != "evaluate":
            raise InvalidInput(f"job {run} is of the kind {job.kind}; expected evaluate")
        try:
            return [EvalItem.model_validate_json(line) for line in client.lines(run) if line]
        except ValidationError as error:
            raise UpstreamError(f"what {client.server} sends are no items of ours") from error


def _names(found: dict[str, list[EvalItem]]) -> dict[str, str]:
    """What the report calls each run: its model's name, with the run's where two have the same."""
    names = {run: Path(items[0].model).name if items[0].model.startswith("/") else items[0].model
             for run, items in found.items()}  # fmt: skip
    often = Counter(names.values())
    return {
        run: name if often[name] == 1 else f"{name} ({Path(run).name[:32]})"
        for run, name in names.items()
    }
