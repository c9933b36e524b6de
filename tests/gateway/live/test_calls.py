"""Faults of model servers, and callers that leave: nobody hangs, nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import json

import httpx
import pytest

from fake_vllm import Drop, FakeVllm, Garbage, Lie, Say, Status
from live_gateway import live_gateway
from waiting import PATIENCE_S, until

ASK = {"model": "asap", "messages": [{"role": "user", "content": "planted words"}]}
WORDS = [f"w{n} " for n in range(20)]


@pytest.fixture
def servers():
    with FakeVllm() as one, FakeVllm() as other:
        yield one, other


@pytest.fixture
def serve(tmp_path):
    with contextlib.ExitStack() as stack:

        def start(*servers, **settings):
            endpoints = {"asap": tuple(server.url for server in servers)}
            times = {"first_byte_s": PATIENCE_S, "gap_s": PATIENCE_S} | settings
            return stack.enter_context(live_gateway(tmp_path, endpoints=endpoints, **times))

        yield start


def ask(gateway, **changes):
    return httpx.post(f"{gateway.url}/v1/chat/completions", json=ASK | changes, timeout=PATIENCE_S)


async def begun(gateway, http, **changes):
    """A stream whose first bytes have reached the gateway."""
    body = ASK | {"stream": True} | changes
    answer = asyncio.create_task(http.post("/v1/chat/completions", json=body))
    await until(lambda: gateway.serving.caller.calls)
    return answer


def error_of(text):
    """The last event of a stream that was broken off."""
    *_, last = [line for line in text.split("\n\n") if line]
    assert "[DONE]" not in text
    return json.loads(last.removeprefix("data: "))["error"]


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ({"stops_after": 6}, "upstream-timeout"),
        ({"resets_after": 5}, "upstream-invalid"),
        ({"ends_after": 5}, "upstream-invalid"),
        ({"fails_after": 5}, "upstream-invalid"),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "thinking", [{}, {"thinking": {"format": "separate"}}, {"thinking": {"budget_tokens": 15}}]
)
def test_a_stream_that_breaks_off_ends_in_one_error(serve, servers, fault, code, thinking):
    one, other = servers
    one.script = other.script = [Say(*WORDS, waits_after=5, **fault)]
    gateway = serve(one, other)
    url, body, text = f"{gateway.url}/v1/chat/completions", ASK | {"stream": True} | thinking, ""
    with httpx.stream("POST", url, json=body, timeout=PATIENCE_S) as answer:
        assert answer.status_code == 200
        for piece in answer.iter_text():
            text += piece
            if "w4" in text:  # what came before the fault is here
                for call in list(gateway.serving.caller.calls):
                    call._gap_s = 0.5 if "stops_after" in fault else PATIENCE_S
                one.go.set()
                other.go.set()
    assert error_of(text)["code"] == code
    assert "w4" in text
    assert text.count('"error"') == 1
    assert "planted" not in text
    assert len(one.requests) + len(other.requests) == 1  # never tried again after the first byte


def test_a_server_that_stays_silent_is_a_504(serve, servers):
    one, _ = servers
    one.script = [Say("late", delay_s=3600)]
    answer = ask(serve(one, first_byte_s=0.5), stream=True)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "upstream-timeout")


async def test_nobody_else_waits_for_a_server_that_stays_silent(serve, servers):
    one, other = servers
    one.script = [Say("late", delay_s=3600)]
    gateway = serve(one, other, first_byte_s=3600)
    async with httpx.AsyncClient(base_url=gateway.url, timeout=PATIENCE_S) as http:
        body = ASK | {"stream": True}
        asked = [
            asyncio.create_task(http.post("/v1/chat/completions", json=body)) for _ in range(20)
        ]
        await until(lambda: len(one.requests) + len(other.requests) == 20)
        await until(lambda: sum(task.done() for task in asked) == len(other.requests))
        assert {task.result().status_code for task in asked if task.done()} == {200}
        assert one.requests
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


def test_a_request_that_brought_no_byte_goes_to_another_server(serve, servers):
    for fault in (Drop(), Status(503), Status(429)):
        one, other = servers
        one.script = [fault]
        one.requests.clear()
        other.requests.clear()
        gateway_answers = []
        if fault == Drop():
            gateway = serve(one, other)
        for _ in range(4):
            gateway_answers.append(ask(gateway).status_code)
            gateway_answers.append(ask(gateway, stream=True).status_code)
        assert set(gateway_answers) == {200}, fault
        assert len(other.requests) == 8


@pytest.mark.parametrize(
    ("script", "status", "code"),
    [
        (Drop(), 503, "upstream-unavailable"),
        (Status(503), 503, "upstream-unavailable"),
        (Status(429), 429, "overloaded"),
        (Status(400), 400, "invalid-input"),
        (Status(500), 502, "upstream-invalid"),
        (Status(404), 502, "upstream-invalid"),
        (Lie(), 502, "upstream-invalid"),
        (Garbage(), 502, "upstream-invalid"),
        (Garbage(b"[]", "application/json"), 502, "upstream-invalid"),
    ],
    ids=str,
)
def test_what_a_server_says_of_an_error_is_not_passed_on(serve, servers, script, status, code):
    one, _ = servers
    one.script = [script]
    answer = ask(serve(one))
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert "planted" not in answer.text


def test_a_server_that_is_gone_is_a_503(serve):
    with FakeVllm() as server:
        gateway = serve(server)
    assert ask(gateway).status_code == 503


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("item", [Say("late", delay_s=3600), Say(*WORDS * 100, gap_s=1.0)])
async def test_a_caller_that_leaves_ends_the_generation(serve, servers, stream, item):
    one, _ = servers
    one.script = [item]
    gateway = serve(one, first_byte_s=3600, gap_s=3600)
    async with httpx.AsyncClient(base_url=gateway.url, timeout=PATIENCE_S) as http:
        body = ASK | {"stream": stream}
        asking = asyncio.create_task(http.post("/v1/chat/completions", json=body))
        await until(lambda: one.concurrent)
        await asyncio.sleep(0.1)
        assert not one.cancelled
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking
    await until(lambda: one.cancelled)


async def test_a_slow_reader_makes_the_server_wait(serve, servers):
    one, _ = servers
    one.script = [Say(*["x" * 50_000] * 4000)]  # 200 MB
    gateway = serve(one)
    body = ASK | {"stream": True}
    async with (
        httpx.AsyncClient(base_url=gateway.url, timeout=PATIENCE_S) as http,
        http.stream("POST", "/v1/chat/completions", json=body) as answer,
    ):
        pieces = answer.aiter_raw()
        read = len(await anext(pieces))
        before = -1
        while before != one.sent_bytes:  # until nothing moves
            before = one.sent_bytes
            await asyncio.sleep(0.5)
        assert before < 100_000_000
        [call] = gateway.serving.caller.calls
        assert call._response.content._size <= 256 * 2**10
        async for piece in pieces:
            read += len(piece)
    assert read > 200_000_000


async def test_leaving_lets_streams_finish(serve, servers):
    one, _ = servers
    one.script = [Say(*WORDS, waits_after=5)]
    gateway = serve(one, grace_s=3600)
    async with httpx.AsyncClient(base_url=gateway.url, timeout=PATIENCE_S) as http:
        asking = await begun(gateway, http)
        gateway.serving.leave()
        refused = await http.post("/v1/chat/completions", json=ASK)
        one.go.set()
        answer = await asking
    assert answer.text.endswith("data: [DONE]\n\n")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not-ready")
    assert "Retry-After" in refused.headers


async def test_leaving_ends_streams_after_the_grace(serve, servers):
    one, _ = servers
    one.script = [Say(*WORDS, waits_after=5)]
    gateway = serve(one, grace_s=0.1)
    async with httpx.AsyncClient(base_url=gateway.url, timeout=PATIENCE_S) as http:
        asking = await begun(gateway, http)
        gateway.serving.leave()
        answer = await asking
    assert error_of(answer.text)["code"] == "not-ready"


@pytest.mark.parametrize("stream", [True, False])
async def test_leaving_ends_what_has_no_answer_yet_after_the_grace(serve, servers, stream):
    one, other = servers
    one.script = other.script = [Say("late", delay_s=3600)]
    gateway = serve(one, other, first_byte_s=3600, grace_s=0.1)
    async with httpx.AsyncClient(base_url=gateway.url, timeout=PATIENCE_S) as http:
        asking = asyncio.create_task(
            http.post("/v1/chat/completions", json=ASK | {"stream": stream})
        )
        await until(lambda: one.concurrent + other.concurrent)
        gateway.serving.leave()
        answer = await asking
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not-ready")
    assert len(one.requests) + len(other.requests) == 1, "no other server is tried"
