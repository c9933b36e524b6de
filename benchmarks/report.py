"""What all benchmarks share: real traces where they are at hand, a clock, a table."""

from __future__ import annotations

import gzip
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).parent.parent


def data_folder() -> Path | None:
    """ASAP_TEST_DATA, or a `data` folder beside the checkout; None when there is neither."""
    beside = [path.parent for path in REPOSITORY.parent.glob("*/data/cot_code.jsonl.gz")]
    folder = os.environ.get("ASAP_TEST_DATA") or next(iter(beside), None)
    return Path(folder) if folder else None


def read_gzip(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL.gz file."""
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def traces(
    name: str = "cot_code", fallback: str = "examples/triples.jsonl"
) -> list[dict[str, Any]]:
    """Real traces: the test data, else the samples of the repository."""
    folder = data_folder()
    if folder is not None:
        return read_gzip(folder / f"{name}.jsonl.gz")
    lines = (REPOSITORY / fallback).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def best_of(repeats: int, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the fastest of `repeats` runs, and the last result."""
    seconds = []
    result = None
    for _ in range(repeats):
        started = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - started)
    return min(seconds), result


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print one table under the machine's name."""
    console = Console(width=120)
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table)
    console.print(
        f"[dim]{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}[/]",
        highlight=False,
    )
