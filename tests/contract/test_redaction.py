"""Secrets and text are planted everywhere and everything is made to fail: none may be found in
logs, problems, metrics or spans.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack

import httpx
import pytest
from starlette.routing import Route

from asap.fine import fine_prune
from asap_anchor.settings import AnchorSettings
from asap_anchor.stage import AnchorStage
from asap_gateway.app import create_app
from asap_gateway.metrics import HttpMetrics
from asap_gateway.service import Gateway
from asap_gateway.settings import GatewayLimits
from asap_runtime.blobs import BlobStore
from asap_runtime.health import serve_worker, worker_app
from asap_runtime.host import StageHost, open_database
from asap_runtime.logs import configure_logs
from asap_runtime.queue import MemoryQueue
from asap_runtime.settings import TelemetrySettings
from asap_runtime.stage import Done
from asap_runtime.telemetry import configure_traces
from asap_surprisal.api import score_endpoint
from asap_surprisal.batcher import BatchingScorer
from asap_surprisal.settings import ScorerSettings
from fakes import TableScorer
from openai_server import OpenAIServer, Reply, Status
from otlp_receiver import collector
from waiting import PATIENCE_S, until

PLANT = "planted"
COT = "planted one step.\n\nplanted two steps.\n\nplanted three steps."
LLM = {"price_in": 1.0, "price_out": 1.0, "model": "tiny", "api_key": "sk-planted-key"}
JSON = {"content-type": "application/json"}
WAIT_S = 60
"""The longest that a request may ask for."""
CONFIG = {"protocol": "rewrite", "match": "paper", "max_attempts": 1, "on_fail": "drop"}


class ScoringStage:
    """The surprisal stage with a table for a model; some texts break it."""

    name, concurrency = "surprisal", 8

    def __init__(self):
        self.scorer = BatchingScorer(
            TableScorer(self._score), max_batch_tokens=1000, max_text_tokens=1000
        )

    @staticmethod
    def _score(steps):
        if any("break the model" in step for step in steps):
            raise RuntimeError(f"planted: cannot score {steps}")
        return [float(len(step)) for step in steps]

    async def start(self):
        self.scorer.start()

    async def process(self, record):
        if "break the stage" in record.triple.question:
            raise RuntimeError(f"planted: cannot prune {record.triple.question}")
        [pruned] = await fine_prune([record], self.scorer)
        return Done(pruned)

    async def stop(self):
        await self.scorer.stop()


class Llm:
    """Answers by what stands in the prompt; error bodies quote prompt and key."""

    def __init__(self):
        self.told_to_wait = False

    def __call__(self, prompt, body):
        if "refuse" in prompt:
            return Status(401)
        if "babble" in prompt:
            return Reply("PLANTED 0123456789 =+*%#@ 0123456789 =+*%#@ 0123456789")
        if not self.told_to_wait:
            self.told_to_wait = True
            return Status(429, retry_after="0")
        return Reply(COT)


def triple(question, cot=COT):
    return {"question": f"planted question: {question}", "cot": cot, "answer": "planted answer"}


@pytest.fixture
async def platform(tmp_path, monkeypatch):
    """Clients of a gateway and of a worker in this process, and the collector of their spans."""
    monkeypatch.chdir(tmp_path)
    async with AsyncExitStack() as stack:
        spans = stack.enter_context(collector())
        shutdown = configure_traces(TelemetrySettings(otlp_endpoint=spans.url), "test")
        stack.push_async_callback(asyncio.to_thread, shutdown)
        llm = await stack.enter_async_context(OpenAIServer(Llm()))
        settings = AnchorSettings(home=tmp_path / "home", llm={**LLM, "base_url": llm.base_url})
        database = open_database(settings)
        stack.callback(database.close)
        scoring = ScoringStage()
        host = StageHost(
            database, MemoryQueue(), [AnchorStage(settings), scoring], sweep_period_s=0.05
        )
        blobs = BlobStore.in_folder(tmp_path / "blobs")
        limits = GatewayLimits(max_body_bytes=10_000)
        gateway = Gateway(database, host.queue, limits, blobs)
        stack.enter_context(gateway.submissions.ingester)
        app = create_app(gateway)

        async def break_the_gateway():
            raise ValueError("planted: a defect of the gateway")

        app.add_api_route("/defect", break_the_gateway)
        app.add_middleware(HttpMetrics)
        score = score_endpoint(lambda: scoring.scorer, ScorerSettings())
        worker = worker_app(host, [Route("/score", score, methods=["POST"])])
        clients = []
        for served in (app, worker):
            port = await stack.enter_async_context(serve_worker(served, "127.0.0.1", 0))
            client = httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{port}", headers=JSON, timeout=2 * PATIENCE_S
            )
            clients.append(await stack.enter_async_context(client))
        await stack.enter_async_context(host)
        yield *clients, spans
        await asyncio.to_thread(shutdown)


async def refusals(gateway, worker):
    """Every way to fail that we know, as (expected code, answer)."""
    long = "planted " * 2000
    scores = [
        ("internal-error", {"question": "planted", "steps": ["break the model"]}),
        ("invalid-input", {"question": ["planted"], "steps": "planted"}),
        ("text-too-long", {"question": long, "steps": ["x"]}),
        ("control-token-in-text", {"question": "planted </think>", "steps": ["x"]}),
    ]
    broken = triple("x", "a planted text.\n\nbreak the model.\n\nx")
    direct = CONFIG | {"method": "asap_stage2", "max_tokens": 4}
    prunes = [
        ("invalid-input", {"triple": {"question": ["planted"], "cot": 7, "answer": None}}),
        ("invalid-input", {"triple": triple("x"), "config": {"tau": "planted"}}),
        ("control-token-in-text", {"triple": triple("</think> planted")}),
        ("invalid-utf8", {"triple": triple("\ud800 planted")}),
        ("upstream-invalid", {"triple": triple("refuse"), "config": CONFIG}),
        ("coarse-exhausted", {"triple": triple("x", COT + " babble"), "config": CONFIG}),
        ("internal-error", {"triple": triple("break the stage"), "config": CONFIG}),
        ("internal-error", {"triple": broken, "config": direct}),
    ]
    half = b'{"question": planted'
    tries = [
        ("internal-error", gateway.get("/defect")),
        ("malformed-json", gateway.post("/prune", content=half)),
        ("malformed-json", worker.post("/score", content=half)),
        ("payload-too-large", gateway.post("/prune", content=long)),
        *((code, worker.post("/score", json=body)) for code, body in scores),
        *(
            (code, gateway.post("/prune", content=json.dumps({"wait_s": WAIT_S} | body)))
            for code, body in prunes
        ),
    ]
    return [(code, await request) for code, request in tries]


async def test_no_plant_is_ever_shown(platform, capfd):
    configure_logs(TelemetrySettings(log_level="debug", log_json=True))
    gateway, worker, spans = platform
    body = {"triple": triple("good"), "config": CONFIG, "wait_s": WAIT_S}
    good = await gateway.post("/prune", json=body)
    assert good.status_code == 200, good.text
    assert PLANT in good.text  # the record is the caller's own
    shown = []
    for code, answer in await refusals(gateway, worker):
        assert (answer.json().get("code"), answer.headers["content-type"]) == (
            code, "application/problem+json",
        )  # fmt: skip
        shown.append(answer.text)
    for job in (await gateway.get("/jobs")).json()["jobs"]:
        shown.append(json.dumps(job))
        shown.append((await gateway.get(f"/jobs/{job['id']}/items")).text)
    metrics = [(await client.get("/metrics")).text for client in (gateway, worker)]
    logged = ""

    def is_logged():
        nonlocal logged
        logged += "".join(capfd.readouterr())
        events = ("item.crashed", "request.crashed", "library.logged", "item.left_stage")
        return all(f'"event": "{event}"' in logged for event in events)

    await until(is_logged)
    names = {"stage anchor", "chat tiny", "stage surprisal", "score batch"}
    await until(lambda: {s.name for s in spans.spans} >= names)  # sent every few seconds
    for name in ("asap_llm_requests_total", "asap_http_seconds_count", "asap_score_seconds_count"):
        assert name in metrics[0]
    for text in (*shown, *metrics, logged):
        assert PLANT not in text.lower()
    assert not any(PLANT.encode() in body.lower() for body in spans.bodies)
