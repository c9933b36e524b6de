"""Milliseconds per item through submit, two no-op stages and result: flat from 1,000 items on?

Twice: in one process on SQLite and the memory queue, and as processes on PostgreSQL and Redis
(this one submits and sweeps, as the gateway does; one worker for each stage).

python benchmarks/throughput.py [--full] [--only embedded|cluster] [ITEMS ...]
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from report import show

from asap.config import PruneConfig
from asap.types import Record, Triple
from asap_runtime.brokers import open_queue
from asap_runtime.database import Database, open_engine
from asap_runtime.host import StageHost
from asap_runtime.intake import JobIntake
from asap_runtime.ledger import JobLedger
from asap_runtime.logs import configure_logs
from asap_runtime.migrate import upgrade
from asap_runtime.queue import BATCH
from asap_runtime.settings import TelemetrySettings
from asap_runtime.stage import Done
from asap_runtime.values import NewItem

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from engines import postgres, redis_server

SIZES, FULL = (1_000, 10_000), (1_000, 10_000, 100_000)
STAGES = ("anchor", "surprisal")
COLUMNS = (
    "items", "submit /s", "two stages /s", "result /s", "ms per item", "ratio", "peak RSS MB",
    "workers MB", "Redis MB",
)  # fmt: skip
SPAWN = multiprocessing.get_context("spawn")


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


@dataclass(frozen=True)
class Times:
    """One job: seconds of its three parts, and the most memory of this process in MB."""

    submit_s: float
    work_s: float
    read_s: float
    rss_mb: float


def no_op_payload() -> bytes:
    """A record with a trace of 400 words."""
    triple = Triple(id="x", question="q" * 200, cot="a step\n\n" * 50, answer="a" * 200)
    return Record(triple=triple, config=PruneConfig()).model_dump_json().encode()


def peak_rss_mb() -> float:
    """Of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


async def run_job(items: int, database: Database, host: StageHost) -> Times:
    """One job of so many items, from submit to the last byte of its result."""
    intake, ledger = JobIntake(database), JobLedger(database)
    payload = no_op_payload()
    started = time.perf_counter()
    job = intake.create_job("bench", "prune", {}, BATCH)
    intake.add_items(job, (NewItem(i, STAGES[0], payload) for i in range(items)))
    intake.mark_ingested(job)
    host.wake()
    submitted = time.perf_counter()
    while True:
        view = await asyncio.to_thread(ledger.job, "bench", job)
        assert view is not None
        if view.phase == "done":
            break
        # Counting a job costs time itself: seldom, and the more so the longer the job takes.
        await asyncio.sleep(min(1.0, items / 50_000))
    worked = time.perf_counter()
    count = await asyncio.to_thread(lambda: sum(1 for _ in ledger.results("bench", job)))
    read = time.perf_counter()
    assert count == items, f"{count} results of {items} items"
    return Times(submitted - started, worked - submitted, read - worked, peak_rss_mb())


def serve(items: int, database_url: str, queue_url: str, stages: Sequence[str]) -> Times:
    """Run one job in this process, which has these stages; the others are elsewhere."""
    configure_logs(TelemetrySettings(log_level="error"))
    upgrade(database_url)
    database = Database(open_engine(database_url))

    async def run() -> Times:
        host = StageHost(database, open_queue(queue_url), [NoOp(name) for name in stages])
        async with host:
            if not stages:
                await asyncio.sleep(3)  # the workers have connected
            return await run_job(items, database, host)

    times = asyncio.run(run())
    database.close()
    return times


def work(
    stage: str,
    database_url: str,
    queue_url: str,
    rss_mb: multiprocessing.Queue[float],
    kind: type[NoOp] = NoOp,
) -> None:
    """A worker process: one stage until SIGTERM; then it says how much memory it took."""
    configure_logs(TelemetrySettings(log_level="error"))
    upgrade(database_url)
    database = Database(open_engine(database_url))

    async def run() -> None:
        ended = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
        async with StageHost(database, open_queue(queue_url), [kind(stage)]):
            await ended.wait()

    asyncio.run(run())
    database.close()
    rss_mb.put(peak_rss_mb())


def in_process_of_its_own(*arguments: object) -> Times:
    """`serve`, where memory is not that of an earlier run."""
    with ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
        return pool.submit(serve, *arguments).result()


def embedded(items: int) -> tuple[Times, tuple[str, ...]]:
    """One process, SQLite and the memory queue."""
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'asap.db'}"
        return in_process_of_its_own(items, url, "memory://", STAGES), ("", "")


def cluster(items: int) -> tuple[Times, tuple[str, ...]]:
    """PostgreSQL, Redis, one worker process per stage; memory of the workers and of Redis."""
    with ExitStack() as stack:
        database_url = stack.enter_context(postgres.serve()).create_database()
        broker = stack.enter_context(redis_server.serve())
        upgrade(database_url)
        rss_mb = SPAWN.Queue()
        arguments = (database_url, broker.url, rss_mb)
        workers = [SPAWN.Process(target=work, args=(stage, *arguments)) for stage in STAGES]
        for worker in workers:
            worker.start()
        try:
            times = in_process_of_its_own(items, database_url, broker.url, ())
        finally:
            for worker in workers:
                worker.terminate()
        most = max(rss_mb.get(timeout=30) for _ in workers)
        for worker in workers:
            worker.join()
        with broker.client() as client:
            redis_mb = client.info("memory")["used_memory_peak"] / 2**20
    return times, (f"{most:,.0f}", f"{redis_mb:,.1f}")


KINDS = {
    "embedded": (embedded, "No-op stages, one process, SQLite and the memory queue"),
    "cluster": (cluster, "No-op stages, a process each, PostgreSQL and Redis"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="with 100,000 items")
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("items", nargs="*", type=int)
    given = parser.parse_args()
    for run, title in [KINDS[given.only]] if given.only else KINDS.values():
        if run is cluster and (reason := postgres.missing() or redis_server.missing()):
            print(f"skipped: {reason}")
            continue
        rows = []
        first_ms = 0.0
        for items in given.items or (FULL if given.full else SIZES):
            times, memory = run(items)
            item_ms = (times.submit_s + times.work_s + times.read_s) / items * 1e3
            first_ms = first_ms or item_ms
            rows.append(
                (
                    f"{items:,}",
                    f"{items / times.submit_s:,.0f}",
                    f"{items / times.work_s:,.0f}",
                    f"{items / times.read_s:,.0f}",
                    f"{item_ms:.2f}",
                    f"{item_ms / first_ms:.2f}",
                    f"{times.rss_mb:,.0f}",
                    *memory,
                )
            )
        show(title, COLUMNS, rows)


if __name__ == "__main__":
    main()
