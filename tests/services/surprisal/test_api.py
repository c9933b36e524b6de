"""POST /score over real HTTP, with a table for a model that works when it is let."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import Route

from asap.errors import CapacityError
from asap.ports import ScoreRequest
from asap.surprisal import build_context
from asap_runtime.health import serve_worker
from asap_surprisal.api import score_endpoint
from asap_surprisal.batcher import BatchingScorer
from asap_surprisal.scorer import TorchScorer
from asap_surprisal.settings import ScorerSettings
from fakes import TableScorer, count_words
from waiting import PATIENCE_S, until

ONE = {"question": "How many?", "steps": ["one two", "three"]}
SETTINGS = ScorerSettings(max_body_bytes=2048, max_requests=3)


class Gated(TableScorer):
    """Surprised by the length of a step; works while the gate is open."""

    def __init__(self):
        super().__init__(lambda steps: [float(len(step)) for step in steps])
        self.gate = asyncio.Event()
        self.gate.set()
        self.batches = 0

    async def score(self, requests):
        self.batches += 1
        await self.gate.wait()
        return await super().score(requests)


class Door:
    """The served endpoint and what stands behind it."""

    def __init__(self, http, port, behind, batching):
        self.http, self.port, self.behind, self.batching = http, port, behind, batching

    async def post(self, body):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.http.post("/score", content=content)

    async def occupy(self, *names):
        """The calls of two callers, whose batches the scorer now holds."""
        self.behind.gate.clear()
        calls = []
        for name in names:
            calls.append(asyncio.create_task(self.post(words(20, name))))
            while self.behind.batches < len(calls):  # noqa: ASYNC110 - a number, not an event
                await asyncio.sleep(0.01)
        return calls

    async def waiting(self, tokens):
        await until(lambda: self.batching.waiting_tokens == tokens)


@pytest.fixture
async def door():
    behind = Gated()
    batching = BatchingScorer(behind, max_batch_tokens=50, max_text_tokens=50)
    batching.start()
    endpoint = score_endpoint(lambda: batching, SETTINGS)
    app = Starlette(routes=[Route("/score", endpoint, methods=["POST"])])
    async with (
        serve_worker(app, "127.0.0.1", 0) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as http,
    ):
        yield Door(http, port, behind, batching)
    await batching.stop()


def words(count, name="q"):
    """A text that `count_words` finds this long, with the question and the think mark."""
    prefix = count_words(build_context(name, ("",)).text)
    return {"question": name, "steps": ["w " * (count - prefix)]}


def problem(answer):
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["instance"] == "/score"
    return answer.status_code, answer.json()["code"]


async def test_each_step_has_its_score_by_name(door):
    answer = await door.post(ONE)
    assert answer.status_code == 200
    assert answer.json() == {
        "model": "table",
        "tokenizer": "words",
        "scores": {"first_token_surprisal": [7.0, 5.0]},
        "tokens": [2, 1],
        "tokens_joined": [3, 2],
        "total": 4,
        "bos": 0,
        "flags": [],
    }


async def test_a_list_is_answered_by_a_list_in_order(door):
    chosen = {**ONE, "scores": ["mean_surprisal", "step_entropy"], "context": "chat"}
    answer = await door.post([ONE, chosen, ONE])
    assert [sorted(one["scores"]) for one in answer.json()] == [
        ["first_token_surprisal"],
        ["mean_surprisal", "step_entropy"],
        ["first_token_surprisal"],
    ]
    assert door.behind.requests[1] == ScoreRequest(
        "How many?", ("one two", "three"), ("mean_surprisal", "step_entropy"), "chat"
    )


@pytest.mark.parametrize(
    ("body", "pointers"),
    [
        ({}, ["/question", "/steps"]),
        ([ONE, {**ONE, "steps": []}], ["/1/steps"]),
        ({**ONE, "steps": ["planted", 7]}, ["/steps/1"]),
        ({**ONE, "scores": ["mean_surprisal", "planted"]}, ["/scores/1"]),
        ({**ONE, "pl~an/ted": 1}, ["/pl~0an~1ted"]),
        ("planted", [""]),
    ],
)
async def test_wrong_fields_are_named_and_never_shown(door, body, pointers):
    answer = await door.post(body)
    assert problem(answer) == (422, "invalid-input")
    assert [error["pointer"] for error in answer.json()["errors"]] == pointers
    assert "planted" not in answer.text
    assert not door.behind.requests


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{planted", 400, "malformed-json"),
        (b'{"question": "\xff", "steps": []}', 400, "malformed-json"),
        (b'{"question": "\\ud800", "steps": ["a"]}', 400, "malformed-json"),
        (b"[" * 2000, 400, "malformed-json"),
        ([], 422, "invalid-input"),
        ([ONE] * 4, 422, "invalid-input"),
        ({**ONE, "question": "</think> planted"}, 422, "control-token-in-text"),
        (b" " * 2049, 413, "payload-too-large"),
        (words(51), 422, "text-too-long"),
        ([words(40), words(40), words(40)], 422, "text-too-long"),
    ],
)
async def test_what_cannot_be_scored_is_refused_by_name(door, body, status, code):
    answer = await door.post(body)
    assert problem(answer) == (status, code)
    assert "planted" not in answer.text
    assert (door.behind.requests, door.batching.waiting_tokens) == ([], 0)


async def test_a_body_that_streams_for_ever_is_refused_at_the_limit(door):
    reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
    writer.write(b"POST /score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(3):
        writer.write(b"400\r\n" + b" " * 1024 + b"\r\n")  # and no end
    answer = await reader.read()  # until the server hangs up
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"payload-too-large" in answer
    writer.close()


async def test_a_full_queue_says_when_to_come_again(door):
    calls = await door.occupy("a", "b")
    calls.append(asyncio.create_task(door.post([words(40), words(40)])))
    await door.waiting(80)
    calls.append(asyncio.create_task(door.post(words(50))))
    await door.waiting(130)
    answer = await door.post(words(10))
    assert problem(answer) == (429, "overloaded")
    assert 1 <= answer.json()["retry_after_s"] <= 360
    assert int(answer.headers["retry-after"]) >= 1
    door.behind.gate.set()
    assert [answer.status_code for answer in await asyncio.gather(*calls)] == [200] * 4
    assert (await door.post(words(10))).status_code == 200


async def test_who_hangs_up_leaves_the_queue(door):
    stay = await door.occupy("stays", "stays too")
    _, writer = await asyncio.open_connection("127.0.0.1", door.port)
    body = json.dumps(words(30, "goes")).encode()
    head = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await door.waiting(30)
    writer.close()
    await door.waiting(0)
    door.behind.gate.set()
    assert [answer.status_code for answer in await asyncio.gather(*stay)] == [200, 200]
    assert [request.question for request in door.behind.requests] == ["stays", "stays too"]


async def test_a_worker_that_loads_or_drains_says_so(door):
    def loading():
        raise CapacityError("the model is not loaded", code="not-ready", retry_after_s=5.0)

    app = Starlette(routes=[Route("/score", score_endpoint(loading, SETTINGS), methods=["POST"])])
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test"
    ) as client:
        answer = await client.post("/score", json=ONE)
    assert problem(answer) == (503, "not-ready")
    assert (answer.json()["title"], answer.headers["retry-after"]) == ("Not ready", "5")
    calls = await door.occupy("a", "b")
    calls.append(asyncio.create_task(door.post(words(30))))
    await door.waiting(30)
    await door.batching.stop()
    for answer in await asyncio.gather(*calls):
        assert problem(answer) == (503, "not-ready")


async def test_a_gateway_can_take_the_handler_as_a_route_of_its_own(door):
    app = FastAPI()
    endpoint = score_endpoint(lambda: door.batching, SETTINGS)
    app.add_api_route("/score", endpoint, methods=["POST"])
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test"
    ) as client:
        assert (await client.post("/score", json=ONE)).json()["total"] == 4
    assert "/score" in app.openapi()["paths"]


async def test_the_scores_are_those_of_the_model(tiny_model_dir):
    model = await asyncio.to_thread(TorchScorer.load, str(tiny_model_dir), device="cpu")
    batching = BatchingScorer(model, max_batch_tokens=512)
    batching.start()
    endpoint = score_endpoint(lambda: batching, ScorerSettings())
    app = Starlette(routes=[Route("/score", endpoint, methods=["POST"])])
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test"
    ) as client:
        answer = (await client.post("/score", json=ONE)).json()
    request = ScoreRequest(ONE["question"], tuple(ONE["steps"]), ("first_token_surprisal",))
    [expected] = model.score_batch([request])
    assert answer["scores"] == expected.model_dump(mode="json")["scores"]
    assert answer["model"] == answer["tokenizer"] == str(tiny_model_dir)
    await batching.stop()
    model.close()
