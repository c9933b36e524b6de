"""The client of vLLM against a scripted server, with every fault we know of."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest

from asap.errors import (
    CapacityError,
    InvalidInput,
    Misconfigured,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from asap.eval_config import EvalConfig
from asap_evaluator import generate
from asap_evaluator.generate import Generator
from asap_evaluator.tokens import ModelTokens
from fake_vllm import Drop, FakeVllm, Garbage, Say, Status
from tiny_model import BOS
from waiting import PATIENCE_S, until

SAID = ("<think>\n", "so", "</think>", "3")
GREEDY = EvalConfig()
QUESTION = "MARKER-QUESTION add x."


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(generate, "PAUSES_S", (0.01, 0.01))


@pytest.fixture(scope="module")
def tokens(tiny_model_dir):
    return ModelTokens.load(tiny_model_dir)


@pytest.fixture
def server():
    with FakeVllm(script=[Say(*SAID)]) as server:
        yield server


@pytest.fixture
async def generator(server, tokens):
    generator = Generator(lambda: server.url, server.model, tokens, timeout_s=PATIENCE_S)
    yield generator
    await generator.close()


async def one(generator, *, config=GREEDY, budget=100, number=0, prompt=(0, 1, 2)):
    return await generator.sample(prompt, config, task_id="t", budget=budget, number=number)


async def test_a_completion_is_text_counts_and_times(generator, server):
    server.script = [Say(*SAID, delay_s=0.05, gap_s=0.01)]
    before = time.time()
    sample = await one(generator)
    assert sample.text == "".join(SAID)
    assert (sample.task_id, sample.number, sample.budget) == ("t", 0, 100)
    assert sample.completion_tokens == len(SAID)
    assert sample.finish_reason == "stop"
    assert not sample.truncated
    assert before <= sample.started_at <= time.time()
    assert 0.05 <= sample.ttft_s < sample.seconds
    assert sample.reasoning_tokens is None, "this server tells no ids"


async def test_what_is_sent_is_the_protocol_and_nothing_of_the_models_own(
    generator, server, tokens
):
    config = EvalConfig(temperature=0.6, top_p=0.95, samples=4, seed=7)
    await one(generator, config=config, budget=50, number=3, prompt=(0, 5, 6))
    [sent] = server.asked("/v1/completions")
    wanted = {
        "prompt": [0, 5, 6], "max_tokens": 50, "temperature": 0.6, "top_p": 0.95, "seed": 10,
        "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
        "stop_token_ids": list(tokens.stop_ids), "skip_special_tokens": False, "stream": True,
    }  # fmt: skip
    assert {name: sent[name] for name in wanted} == wanted


async def test_a_budget_that_is_reached_truncates(generator):
    sample = await one(generator, budget=2)
    assert sample.truncated
    assert sample.completion_tokens == 2
    assert sample.text == "<think>\nso"


async def test_prompt_and_budget_must_fit_the_window(generator, server):
    await generator.connect()
    assert (await one(generator, budget=4093)).completion_tokens == len(SAID)
    with pytest.raises(InvalidInput, match="window of 4096") as caught:
        await one(generator, budget=4094)
    assert caught.value.problem_code == "text-too-long"


async def test_connecting_generates_a_token_so_that_the_first_request_waits_for_nothing(
    generator, server
):
    await generator.connect()
    [sent] = server.asked("/v1/completions")
    assert sent["max_tokens"] == 1


async def test_a_model_that_the_server_has_not_is_misconfigured(server, tokens):
    generator = Generator(lambda: server.url, "another", tokens)
    with pytest.raises(Misconfigured, match="no model of this name"):
        await generator.connect()
    await generator.close()


@pytest.mark.parametrize(
    "fault", [Drop(), Say(*SAID, resets_after=2), Say(*SAID, ends_after=2)], ids=repr
)
async def test_a_lost_connection_is_tried_again(generator, server, fault):
    server.script = [fault, fault, Say(*SAID)]
    sample = await one(generator)
    assert sample.text == "".join(SAID), "nothing of the lost tries"
    assert len(server.requests) == 3


async def test_a_connection_that_is_lost_again_and_again_is_given_up(generator, server):
    server.script = [Say(*SAID, resets_after=2)]
    with pytest.raises(UpstreamUnavailable, match="connection"):
        await one(generator)
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("fault", "kind", "retryable"),
    [
        (Status(400), UpstreamError, False),
        (Status(404), UpstreamError, False),
        (Status(429), UpstreamUnavailable, True),
        (Status(500), UpstreamUnavailable, True),
        (Garbage(), UpstreamUnavailable, True),
        (Say(*SAID, fails_after=2), UpstreamUnavailable, True),
    ],
    ids=repr,
)
async def test_what_the_server_refuses_is_not_tried_again_here(
    generator, server, fault, kind, retryable
):
    server.script = [fault, Say(*SAID)]
    with pytest.raises(UpstreamError) as caught:
        await one(generator, prompt=(0, 424242))
    assert type(caught.value) is kind
    assert caught.value.retryable is retryable
    assert "424242" not in f"{caught.value!r} {caught.value.detail} {caught.value.context}"
    assert len(server.requests) == 1


async def test_a_server_that_is_not_there_is_no_fault_of_the_item(tokens):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        generator = Generator(lambda: url, "m", tokens)
        for call in (one(generator), generator.connect(), generator.prompt("q", "server")):
            with pytest.raises(CapacityError) as caught:
                await call
            assert caught.value.problem_code == "not-ready"
        await generator.close()


async def test_a_completion_that_takes_too_long_is_cut_off_at_the_server_too(
    server, tokens, monkeypatch
):
    server.script = [Say(*SAID, stops_after=1)]
    limit = asyncio.timeout(PATIENCE_S)
    monkeypatch.setattr(generate.asyncio, "timeout", lambda seconds: limit)
    generator = Generator(lambda: server.url, server.model, tokens, timeout_s=PATIENCE_S)
    asking = asyncio.create_task(one(generator))
    await until(lambda: server.concurrent == 1)
    limit.reschedule(asyncio.get_running_loop().time())
    with pytest.raises(UpstreamTimeout):
        await asking
    await until(lambda: server.cancelled)
    await generator.close()


async def test_a_cancelled_call_ends_the_generation(generator, server):
    server.script = [Say(*SAID, stops_after=1)]
    asking = asyncio.create_task(one(generator))
    await until(lambda: server.concurrent == 1)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await until(lambda: server.cancelled)
    assert server.concurrent == 0


async def test_no_more_requests_than_allowed_run_at_once(server, tokens):
    generator = Generator(lambda: server.url, server.model, tokens, concurrency=3)
    await asyncio.gather(*(one(generator) for _ in range(9)))
    server.script = [Say(*SAID, stops_after=1)]
    calls = [asyncio.create_task(one(generator)) for _ in range(9)]
    await until(lambda: server.concurrent == 3)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert server.max_concurrent == 3
    await generator.close()


async def test_the_key_is_sent_as_a_bearer_token(server, tokens):
    generator = Generator(lambda: server.url, server.model, tokens, api_key="sesame\n")
    await one(generator)
    assert server.requests[0].headers["Authorization"] == "Bearer sesame"
    await generator.close()


async def test_a_prompt_of_ours_has_one_bos_and_ends_where_thinking_begins(generator, tokens):
    ids = await generator.prompt(QUESTION, "deepseek-r1")
    assert ids[0] == tokens.bos_id
    assert ids.count(tokens.bos_id) == 1
    assert ids[-2:] == tokens.encode("<think>\n").ids


async def test_a_question_that_brings_a_bos_is_refused(generator):
    with pytest.raises(InvalidInput, match="BOS") as caught:
        await generator.prompt(f"{QUESTION}{BOS}", "deepseek-r1")
    assert QUESTION not in caught.value.detail


async def test_a_base_model_without_the_marks_of_a_template_is_refused(generator):
    with pytest.raises(Misconfigured) as caught:
        await generator.prompt(QUESTION, "chatml")
    assert caught.value.problem_code == "unknown-chat-form"


async def test_a_server_without_a_chat_template_is_refused(generator):
    with pytest.raises(Misconfigured, match="no chat template") as caught:
        await generator.prompt(QUESTION, "server")
    assert caught.value.problem_code == "unknown-chat-form"
