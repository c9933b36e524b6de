"""The gateway on SQLite and the memory queue; all is real but the model: a table scores."""

from __future__ import annotations

import httpx
import pytest

from asap.estimate import Prices
from asap.fine import fine_prune
from asap_anchor.settings import AnchorSettings
from asap_anchor.stage import AnchorStage
from asap_gateway.app import create_app
from asap_gateway.service import Gateway
from asap_gateway.settings import GatewayLimits
from asap_gateway.submissions import ServerKnowledge
from asap_runtime.blobs import BlobStore
from asap_runtime.host import StageHost, open_database
from asap_runtime.queue import MemoryQueue
from asap_runtime.stage import Done
from asap_runtime.telemetry import configure_logs
from asap_runtime.webhooks import WebhookSettings
from fakes import TableScorer


class TableStage:
    """The surprisal stage with a table for a model; longer steps surprise more."""

    name, concurrency = "surprisal", 8

    def __init__(self):
        self.scorer = TableScorer(lambda steps: [float(len(step)) for step in steps])

    async def start(self):
        """Nothing to load."""

    async def process(self, record):
        if "crash" in record.triple.question:
            raise RuntimeError("secret text of a trace")
        [pruned] = await fine_prune([record], self.scorer)
        return Done(pruned)

    async def stop(self):
        """Nothing to let go."""


@pytest.fixture
async def client(tmp_path, monkeypatch):
    """An HTTP client of a running application."""
    monkeypatch.chdir(tmp_path)
    settings = AnchorSettings(home=tmp_path / "home")
    configure_logs(settings.telemetry)
    database = open_database(settings)
    host = StageHost(
        database, MemoryQueue(), [AnchorStage(settings), TableStage()], sweep_period_s=0.05
    )
    limits = GatewayLimits(
        max_body_bytes=200_000,
        max_upload_bytes=2_000_000,
        max_inline_triples=100,
        max_job_items=1_000,
    )
    blobs = BlobStore.in_folder(tmp_path / "blobs")
    knowledge = ServerKnowledge(
        defaults={"anchor": "extractive"},
        webhooks=WebhookSettings(hosts=("example.org",), secret="s" * 32),
        prices=Prices(price_in=1.0, price_out=2.0),
    )
    gateway = Gateway(database, host.queue, limits, blobs, knowledge, wake=host.wake)
    app = create_app(gateway)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    with gateway.submissions.ingester:
        async with host, httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            http.app = app
            yield http
    database.close()
