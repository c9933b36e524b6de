"""Items per second through submit, two no-op stages and result, in one process on SQLite and
memory.

python benchmarks/throughput.py [ITEMS ...]
"""

from __future__ import annotations

import asyncio
import resource
import sys
import tempfile
import time
from pathlib import Path

from report import show

from asap.config import PruneConfig
from asap.types import Record, Triple
from asap_runtime.database import Database, open_engine
from asap_runtime.host import StageHost
from asap_runtime.intake import JobIntake
from asap_runtime.ledger import JobLedger
from asap_runtime.migrate import upgrade
from asap_runtime.queue import BATCH, MemoryQueue
from asap_runtime.settings import TelemetrySettings
from asap_runtime.stage import Done
from asap_runtime.telemetry import configure_logs
from asap_runtime.values import NewItem


class NoOp:
    """A stage that gives its record back."""

    concurrency = 64

    def __init__(self, name: str) -> None:
        self.name = name

    async def start(self) -> None:
        """Nothing to load."""

    async def process(self, record: Record) -> Done:
        """The record as it came."""
        return Done(record)

    async def stop(self) -> None:
        """Nothing to let go."""


async def run(items: int, folder: Path) -> tuple[object, ...]:
    """One job of so many items, from submit to the last byte of its result."""
    url = f"sqlite:///{folder / 'asap.db'}"
    upgrade(url)
    database = Database(open_engine(url))
    intake, ledger = JobIntake(database), JobLedger(database)
    triple = Triple(id="x", question="q" * 200, cot="a step\n\n" * 50, answer="a" * 200)
    payload = Record(triple=triple, config=PruneConfig()).model_dump_json().encode()
    async with StageHost(database, MemoryQueue(), [NoOp("anchor"), NoOp("surprisal")]):
        started = time.perf_counter()
        job = intake.create_job("bench", "prune", {}, BATCH)
        intake.add_items(job, (NewItem(i, "anchor", payload) for i in range(items)))
        intake.mark_ingested(job)
        submitted = time.perf_counter()
        while True:
            view = await asyncio.to_thread(ledger.job, "bench", job)
            assert view is not None
            if view.phase == "done":
                break
            await asyncio.sleep(0.1)
        worked = time.perf_counter()
    count = sum(1 for _ in ledger.results("bench", job))
    read = time.perf_counter()
    database.close()
    assert count == items
    return (
        f"{items:,}",
        f"{items / (submitted - started):,.0f}",
        f"{items / (worked - submitted):,.0f}",
        f"{items / (read - worked):,.0f}",
        f"{(read - started) / items * 1e3:.2f}",
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f}",
    )


def main() -> None:
    configure_logs(TelemetrySettings(log_level="error"))
    sizes = [int(text) for text in sys.argv[1:]] or [1_000, 10_000]
    rows = []
    for items in sizes:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(asyncio.run(run(items, Path(folder))))
    show(
        "No-op stages, one process, SQLite and the memory queue",
        ("items", "submit /s", "two stages /s", "result /s", "ms per item", "peak RSS MB"),
        rows,
    )


if __name__ == "__main__":
    main()
