"""POST /prune while nothing else happens, and while a big batch job runs through the same stages.

Ten callers, each with two calls a second, on stages that take a few milliseconds; the latencies are
those of HTTP, queue, database and waiting. Once with everything in one process (SQLite, memory
queue), once with gateway and workers as processes (PostgreSQL, Redis).

python benchmarks/live.py [--items N] [--calls N] [--only embedded|cluster]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import httpx
import uvicorn
from report import show
from throughput import SPAWN, STAGES, NoOp, no_op_payload, postgres, redis_server, work

from asap.types import Record
from asap_gateway.app import create_app
from asap_gateway.service import Gateway
from asap_gateway.settings import GatewayLimits
from asap_gateway.submissions import ServerKnowledge
from asap_runtime.blobs import BlobStore
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

CALLERS, CALL_EVERY_S = 10, 0.5
STAGE_S = 0.003
TENANT = "local"
BODY = {"triple": {"question": "q", "cot": "a step\n\n" * 50, "answer": "a"}, "config": {}}


class ShortStage(NoOp):
    """Takes as long as a cached reply or a small scoring batch."""

    async def process(self, record: Record) -> Done:
        """The record, after `STAGE_S`."""
        await asyncio.sleep(STAGE_S)
        return Done(record)


def serve(
    port: int, folder: Path, database_url: str, queue_url: str, stages: tuple[str, ...]
) -> None:
    """A gateway process, with these stages in it and its blobs in the folder."""
    configure_logs(TelemetrySettings(log_level="error"))
    database = Database(open_engine(database_url))
    host = StageHost(database, open_queue(queue_url), [ShortStage(name) for name in stages])
    gateway = Gateway(
        database,
        host.queue,
        GatewayLimits(),
        BlobStore.in_folder(folder, min_free_share=0.0),
        ServerKnowledge({"anchor": "extractive"}),
        wake=host.wake,
        precedence=host.precedence,
    )
    app = create_app(gateway, running=lambda: host)
    uvicorn.run(app, port=port, log_config=None, ws="none")


def free_port() -> int:
    """A port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(kind: str) -> Iterator[tuple[str, Database]]:
    """URL of a ready gateway, and its database."""
    with ExitStack() as stack:
        processes: list[BaseProcess] = []
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if kind == "embedded":
            database_url, queue_url = f"sqlite:///{folder / 'asap.db'}", "memory://"
        else:
            database_url = stack.enter_context(postgres.serve()).create_database()
            queue_url = stack.enter_context(redis_server.serve()).url
        upgrade(database_url)
        database = Database(open_engine(database_url))
        stack.callback(database.close)
        port = free_port()
        here = STAGES if kind == "embedded" else ()
        arguments = (port, folder, database_url, queue_url, here)
        processes.append(SPAWN.Process(target=serve, args=arguments))
        rss_mb = SPAWN.Queue()
        processes += [
            SPAWN.Process(target=work, args=(stage, database_url, queue_url, rss_mb, ShortStage))
            for stage in STAGES
            if stage not in here
        ]
        for process in processes:
            process.start()
            stack.callback(process.join)
            stack.callback(process.kill)
        url = f"http://127.0.0.1:{port}"
        for _ in range(300):
            try:
                httpx.get(f"{url}/readyz").raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        httpx.post(f"{url}/prune", json=BODY, timeout=90).raise_for_status()
        yield url, database


async def call(url: str, callers: int, calls: int) -> list[float]:
    """Milliseconds of each call; all must bring a record."""
    took = []

    async def one(client: httpx.AsyncClient) -> None:
        await asyncio.sleep(random.uniform(0, CALL_EVERY_S))
        for _ in range(calls // callers):
            started = time.perf_counter()
            answer = await client.post(f"{url}/prune", json=BODY)
            assert answer.status_code == 200, answer.text
            seconds = time.perf_counter() - started
            took.append(seconds * 1e3)
            await asyncio.sleep(max(0.0, CALL_EVERY_S - seconds))

    async with httpx.AsyncClient(timeout=60) as client:
        await asyncio.gather(*(one(client) for _ in range(callers)))
    return took


def submit(database: Database, items: int) -> str:
    """A batch job of so many items, past HTTP."""
    intake = JobIntake(database)
    payload = no_op_payload()
    job = intake.create_job(TENANT, "prune", {}, BATCH)
    intake.add_items(job, (NewItem(line, STAGES[0], payload) for line in range(1, items + 1)))
    intake.mark_ingested(job)
    return job


def row(name: str, took: list[float], reference: list[float]) -> tuple[str, ...]:
    """Median and 95th percentile in ms, what is above the stages' own time, ratio to idle."""
    p50, p95 = statistics.median(took), statistics.quantiles(took, n=20)[-1]
    ratio = p95 / statistics.quantiles(reference, n=20)[-1]
    added = p50 - len(STAGES) * STAGE_S * 1e3
    return name, f"{len(took)}", f"{p50:.1f}", f"{added:.1f}", f"{p95:.1f}", f"{ratio:.2f}"


def measure(kind: str, items: int, calls: int) -> list[tuple[str, ...]]:
    """Rows: one caller, ten callers, ten callers during the job."""
    with running(kind) as (url, database):
        alone = asyncio.run(call(url, 1, calls // 5))
        idle = asyncio.run(call(url, CALLERS, calls))
        job = submit(database, items)
        time.sleep(2)
        busy = asyncio.run(call(url, CALLERS, calls))
        view = JobLedger(database).job(TENANT, job)
        assert view is not None
        assert view.phase == "running", f"{view.phase}: give it more items"
    return [
        row("idle, one caller", alone, idle),
        row("idle, ten callers", idle, idle),
        row(f"during {items:,} items", busy, idle),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--calls", type=int, default=400)
    parser.add_argument("--only", choices=("embedded", "cluster"))
    given = parser.parse_args()
    for kind in [given.only] if given.only else ("embedded", "cluster"):
        if kind == "cluster" and (reason := postgres.missing() or redis_server.missing()):
            print(f"skipped: {reason}")
            continue
        show(
            f"POST /prune, {kind}, two stages of {STAGE_S * 1e3:.0f} ms",
            ("", "calls", "p50 ms", "p50 over stages ms", "p95 ms", "p95 / idle"),
            measure(kind, given.items, given.calls),
        )


if __name__ == "__main__":
    main()
