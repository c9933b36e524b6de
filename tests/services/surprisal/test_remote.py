"""What a scoring server may do wrong, and what it may not be asked. Scores: the contract test."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from asap.errors import (
    InvalidInput,
    Misconfigured,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from asap_surprisal.remote import RemoteScorer
from asap_surprisal.tokenization import HFTokenCounter
from scoring import FIRST, STEPS, request_of
from waiting import PATIENCE_S, until

KEY = "secret-key"
WANTED = request_of(*STEPS[:3], scores=FIRST)


class ScoringServer:
    """Answers as told; by default with the log-probability -position for each token."""

    def __init__(self, answer=None, together=1):
        self.answer, self.together = answer, together
        self.bodies, self.keys, self.now, self.most = [], [], 0, 0

    async def complete(self, http: web.Request) -> web.Response:
        self.now += 1
        self.most = max(self.most, self.now)
        body = await http.json()
        self.bodies.append(body)
        self.keys.append(http.headers.get("Authorization"))
        await until(lambda: self.most >= self.together)
        self.now -= 1
        if self.answer is not None:
            return await self.answer(body)
        found = [{str(token): {"logprob": -at}} for at, token in enumerate(body["prompt"])]
        return web.json_response({"choices": [{"prompt_logprobs": [None, *found[1:]]}]})


@pytest.fixture
async def connect(tiny_model_dir):
    """Starts a server, gives a scorer that talks to it."""
    opened = []

    async def start(server: ScoringServer, **options) -> RemoteScorer:
        app = web.Application()
        app.router.add_post("/v1/completions", server.complete)
        running = TestServer(app)
        await running.start_server()
        settings = {"api_key": KEY, "window": 1000, "timeout_s": PATIENCE_S} | options
        scorer = RemoteScorer(
            base_url=str(running.make_url("/v1")),
            model="served",
            counter=HFTokenCounter.load(str(tiny_model_dir)),
            **settings,
        )
        opened.extend([scorer, running])
        return scorer

    yield start
    for one in opened:
        await one.close()


async def test_asks_by_token_ids_and_reads_by_position(connect, tiny_model_dir):
    server = ScoringServer()
    scorer = await connect(server)
    [scored] = await scorer.score([WANTED])
    plan = scorer.prepare(WANTED).plan
    [body] = server.bodies
    assert body["prompt"][:-1] == plan.rows[0].ids
    assert (body["model"], body["max_tokens"]) == ("served", 1)
    assert server.keys == [f"Bearer {KEY}"]
    assert scored.scores["first_token_surprisal"] == tuple(step[0] for step in plan.steps)
    assert (scorer.name, scorer.tokenizer_name) == ("served", str(tiny_model_dir))


async def test_counts_alone_ask_nobody(connect):
    server = ScoringServer()
    scorer = await connect(server)
    [scored] = await scorer.score([request_of(*STEPS, scores=())])
    assert server.bodies == []
    assert scored.total == scorer.count("\n\n".join(STEPS))


async def test_few_requests_at_a_time_and_answers_in_order(connect):
    server = ScoringServer(together=3)
    scorer = await connect(server, concurrency=3)
    requests = [request_of(*STEPS[: n % 7 + 1], scores=FIRST) for n in range(12)]
    scored = await scorer.score(requests)
    assert server.most == 3
    assert [len(one.tokens) for one in scored] == [len(one.steps) for one in requests]


@pytest.mark.parametrize("name", ["first_token_entropy", "step_entropy"])
async def test_entropies_are_refused_before_anything_is_sent(connect, name):
    server = ScoringServer()
    scorer = await connect(server)
    with pytest.raises(InvalidInput, match=f"tells no {name}"):
        await scorer.score([request_of(scores=(name,))])
    assert server.bodies == []


@pytest.mark.parametrize(
    ("status", "kind", "context"),
    [
        (429, UpstreamUnavailable, {"waits": True}),
        (503, UpstreamUnavailable, {"waits": True}),
        (500, UpstreamUnavailable, {}),
        (400, UpstreamError, {}),
        (401, UpstreamError, {}),
    ],
)
async def test_a_refusal_tells_its_status_and_no_body(connect, status, kind, context):
    async def refuse(body):
        return web.Response(status=status, text=f"cannot score {STEPS[0]}")

    scorer = await connect(ScoringServer(refuse))
    with pytest.raises(UpstreamError) as caught:
        await scorer.score([WANTED, WANTED])
    assert type(caught.value) is kind
    assert caught.value.context == {"status": status, **context}
    assert caught.value.retryable == (status in (429, 500, 503))
    assert STEPS[0] not in str(caught.value)
    assert KEY not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"{}",
        b'{"choices": []}',
        b'{"choices": [{"prompt_logprobs": null}]}',
        b'{"choices": [{"prompt_logprobs": [null]}]}',
    ],
)
async def test_an_answer_of_another_shape(connect, answer):
    async def nonsense(body):
        return web.Response(body=answer)

    scorer = await connect(ScoringServer(nonsense))
    with pytest.raises(UpstreamError, match="scoring server's answer"):
        await scorer.score([WANTED])


async def test_an_answer_for_other_tokens(connect):
    async def others(body):
        found = [{"999999": {"logprob": -1.0}} for _ in body["prompt"]]
        return web.json_response({"choices": [{"prompt_logprobs": found}]})

    scorer = await connect(ScoringServer(others))
    with pytest.raises(UpstreamError, match="lacks a token"):
        await scorer.score([WANTED])


async def test_no_number_is_no_score(connect):
    async def unknown(body):
        found = [{str(token): {"logprob": None}} for token in body["prompt"]]
        return web.json_response({"choices": [{"prompt_logprobs": found}]})

    scorer = await connect(ScoringServer(unknown))
    [scored] = await scorer.score([WANTED])
    assert scored.scores["first_token_surprisal"] == (None,) * 3


async def test_a_server_that_is_silent(connect):
    async def silent(body):
        await asyncio.sleep(60)

    scorer = await connect(ScoringServer(silent), timeout_s=0.2)
    with pytest.raises(UpstreamTimeout, match="no answer within"):
        await scorer.score([WANTED])


async def test_a_server_that_hangs_up(connect):
    async def leave(body):
        raise ConnectionResetError

    scorer = await connect(ScoringServer(leave))
    with pytest.raises(UpstreamUnavailable):
        await scorer.score([WANTED])


@pytest.mark.parametrize("base_url", ["", "host:8000", "ftp://host/v1", "http://[::1"])
async def test_an_address_that_is_none(tiny_model_dir, base_url):
    with pytest.raises(Misconfigured, match="must look like"):
        RemoteScorer(
            base_url=base_url,
            model="x",
            counter=HFTokenCounter.load(str(tiny_model_dir)),
            window=100,
        )
