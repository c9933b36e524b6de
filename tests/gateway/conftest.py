"""The gateway on SQLite and the memory queue; all is real but the models: a table scores, a
script trains, and another one answers and grades."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from asap.estimate import Prices
from asap.fine import fine_prune
from asap.runs import Launch, TrainProgress, TrainResult
from asap_anchor.settings import AnchorSettings
from asap_anchor.stage import AnchorStage
from asap_gateway.app import create_app
from asap_gateway.service import Gateway
from asap_gateway.settings import GatewayLimits
from asap_gateway.submissions import ServerKnowledge
from asap_runtime.benchmarks import BenchmarkFolder
from asap_runtime.blobs import BlobStore
from asap_runtime.host import StageHost, open_database
from asap_runtime.logs import configure_logs
from asap_runtime.models import ModelRegistry
from asap_runtime.queue import MemoryQueue
from asap_runtime.stage import Done, Wait
from asap_runtime.webhooks import WebhookSettings
from evaluation_stages import ScriptedEvaluator, ScriptedGrader, write_benchmarks
from fakes import TableScorer


class TableStage:
    """The surprisal stage with a table for a model; longer steps surprise more."""

    name, concurrency = "surprisal", 8

    def __init__(self):
        self.scorer = TableScorer(lambda steps: [float(len(step)) for step in steps])
        self.go = asyncio.Event()
        """Unless it is set, no item ends."""
        self.go.set()

    async def start(self):
        """Nothing to load."""

    async def process(self, record):
        if "crash" in record.triple.question:
            raise RuntimeError("secret text of a trace")
        await self.go.wait()
        [pruned] = await fine_prune([record], self.scorer)
        return Done(pruned)

    async def stop(self):
        """Nothing to let go."""


class ScriptedTrainer:
    """The trainer as the gateway sees it: progress while the test lets it, then a model."""

    name, concurrency = "trainer", 4

    def __init__(self, database, blobs):
        self.registry, self.blobs = ModelRegistry(database), blobs
        self.steps = 3
        """At which a run ends; None: never."""

    async def start(self):
        """Nothing to load."""

    async def process(self, run):
        step = 0 if run.progress is None else run.progress.step + 1
        if self.steps is None or step < self.steps:
            progress = TrainProgress(phase="training", step=step, loss=1 / (step + 1))
            launch = Launch(launcher="subprocess", name="x", attempt=0)
            return Wait(run.grown(progress=progress, launch=launch), 0.02)
        for name in ("model/weights", "metrics.jsonl"):
            with self.blobs.create(f"{run.prefix}/{name}") as writer:
                writer.write(b"x")
        self.registry.add(
            run.tenant,
            run.model,
            prefix=f"{run.prefix}/model",
            manifest_sha256="0" * 64,
            base=run.base,
            job_id=run.id,
            meta={"loss_last": 0.25},
        )
        return Done(run.grown(result=RESULT))

    async def launched(self):
        return []

    async def cancel(self, job_id):
        """Nothing outlives it."""

    async def stop(self):
        """Nothing to let go."""


RESULT = TrainResult(
    model_sha256="0" * 64, steps=3, samples=4, held_out=0, dropped={}, tokens_per_sample=10.0,
    response_tokens_per_sample=5.0, tokens_per_step=20.0, step_seconds=0.1, seconds=1.0,
    loss_first=1.0, loss_last=0.25, data_sha256="0" * 64, template="chatml", base="demo",
    device="cpu", versions={},
)  # fmt: skip


@pytest.fixture
async def client(tmp_path, monkeypatch):
    """An HTTP client of a running application."""
    monkeypatch.chdir(tmp_path)
    settings = AnchorSettings(home=tmp_path / "home")
    configure_logs(settings.telemetry)
    database = open_database(settings)
    blobs = BlobStore.in_folder(tmp_path / "blobs")
    trainer = ScriptedTrainer(database, blobs)
    evaluator, surprisal = ScriptedEvaluator(), TableStage()
    stages = [AnchorStage(settings), surprisal, trainer, evaluator, ScriptedGrader(evaluator)]
    host = StageHost(database, MemoryQueue(), stages, sweep_period_s=0.05)
    limits = GatewayLimits(
        max_body_bytes=200_000,
        max_upload_bytes=2_000_000,
        max_inline_triples=100,
        max_job_items=1_000,
    )
    knowledge = ServerKnowledge(
        defaults={"anchor": "extractive"},
        webhooks=WebhookSettings(hosts=("example.org",), secret="s" * 32),
        prices=Prices(price_in=1.0, price_out=2.0),
        benchmarks=BenchmarkFolder(write_benchmarks(tmp_path / "benchmarks")),
    )
    gateway = Gateway(database, host.queue, limits, blobs, knowledge, wake=host.wake)
    app = create_app(gateway)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    with gateway.submissions.ingester:
        async with host, httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            http.app, http.trainer, http.blobs = app, trainer, blobs
            http.evaluator, http.surprisal = evaluator, surprisal
            http.registry = trainer.registry
            yield http
    database.close()
