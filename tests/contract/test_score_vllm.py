"""The surprisal stage with a real vLLM server for its backend: the same selection as with torch."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from asap.config import PruneConfig
from asap.types import Record, Triple
from asap_surprisal.api import score_endpoint
from asap_surprisal.settings import SurprisalSettings
from asap_surprisal.stage import SurprisalStage
from scoring import QUESTION, STEPS, request_of
from tiny_model import build_tiny_model

pytestmark = [pytest.mark.contract, pytest.mark.timeout(300)]

APART_NATS = 0.1
"""Of bfloat16; see the remote scorer's own test."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The model that the server was given: the same seed, the same weights."""
    return build_tiny_model(tmp_path_factory.mktemp("twin") / "m", max_positions=4096)


@pytest.fixture
async def stages(vllm_server, directory):
    """The stage with vLLM and the stage with torch, both started."""
    there = {
        "backend": "vllm",
        "model": str(directory),
        "served_model": vllm_server.model,
        "base_url": vllm_server.base_url,
        "api_key": "any",
    }
    started = []
    for group in (there, {"model": str(directory), "device": "cpu"}):
        stage = SurprisalStage(SurprisalSettings(surprisal=group))
        await stage.start()
        started.append(stage)
    yield started
    for stage in started:
        await stage.stop()


async def test_the_stage_is_ready_and_prunes_as_with_torch(stages):
    vllm, torch = stages
    await vllm.ready()
    [scored] = await torch.scorer.score([request_of(scores=("first_token_surprisal",))])
    order = sorted(scored.scores["first_token_surprisal"])
    gap, removed = max((b - a, i) for i, (a, b) in enumerate(pairwise(order), 1))
    assert gap > APART_NATS  # else rounding would choose
    config = PruneConfig(method="asap_stage2", step_ratio=1 - removed / len(STEPS), max_tokens=None)
    record = Record(
        triple=Triple(id="x", question=QUESTION, cot="\n\n".join(STEPS), answer="3"), config=config
    )
    there, here = [(await stage.process(record)).payload for stage in stages]
    assert there.kept_steps == here.kept_steps
    assert len(here.kept_steps) == len(STEPS) - removed
    assert there.tokens.pruned == here.tokens.pruned
    assert set(there.fine.scored.scores) == {"first_token_surprisal"}, "what the server can tell"


async def test_many_records_at_once_and_in_rounds(stages):
    vllm, _ = stages
    config = PruneConfig(
        method="asap_stage2", keep_ratio=0.5, max_tokens=None, mode="iterative", rescore_every=2
    )
    triples = [
        Triple(id=str(i), question=QUESTION, cot="\n\n".join(STEPS * (1 + i % 3)), answer="3")
        for i in range(12)
    ]
    done = await asyncio.gather(
        *(vllm.process(Record(triple=triple, config=config)) for triple in triples)
    )
    for triple, one in zip(triples, done, strict=True):
        assert one.payload.id == triple.id
        assert one.payload.fine.removed
        assert one.payload.tokens.pruned < one.payload.tokens.original


async def test_the_endpoint_answers_and_refuses_what_the_server_cannot_tell(stages):
    vllm, torch = stages
    settings = SurprisalSettings().surprisal
    app = Starlette(
        routes=[
            Route("/vllm", score_endpoint(lambda: vllm.scorer, settings), methods=["POST"]),
            Route("/torch", score_endpoint(lambda: torch.scorer, settings), methods=["POST"]),
        ]
    )
    transport = httpx.ASGITransport(app)
    body = {"question": QUESTION, "steps": list(STEPS)}
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as http:
        there, here = [(await http.post(path, json=body)).json() for path in ("/vllm", "/torch")]
        assert there["tokens"] == here["tokens"]
        pairs = zip(*(one["scores"]["first_token_surprisal"] for one in (there, here)), strict=True)
        assert max(abs(a - b) for a, b in pairs) <= APART_NATS
        refused = await http.post("/vllm", json={**body, "scores": ["step_entropy"]})
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid-input")
