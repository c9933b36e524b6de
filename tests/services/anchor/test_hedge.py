"""A slow request and its double: who wins, who pays, and that limits hold for both."""

from __future__ import annotations

import asyncio
import time

import pytest
from prometheus_client import REGISTRY

from asap.errors import UpstreamTimeout
from asap.ports import ChatResult
from asap.types import Usage
from asap_anchor.cache import ReplyCache
from asap_anchor.hedge import first_answer
from asap_anchor.measure import measure
from openai_server import OpenAIServer, Reply, Stall, Status
from waiting import PATIENCE_S, until

PROMPT = "a private prompt"
COST = Usage(calls=1, prompt_tokens=10, completion_tokens=5, cost_usd=0.5)


async def call(outcome, gate=None):
    if gate is not None:
        await gate.wait()
    if isinstance(outcome, Exception):
        raise outcome
    return ChatResult(outcome, "stop", COST)


async def test_the_second_answers_where_the_first_hangs(chat_for, sampling, tmp_path):
    async with OpenAIServer([Stall(), Reply("yes")]) as server:
        chat = chat_for(server, hedge_after_s=0.05, cache=ReplyCache(tmp_path))
        before = asyncio.all_tasks()
        result = await chat.complete(PROMPT, sampling)
        again = await chat.complete(PROMPT, sampling)

        assert (result.text, result.usage.calls) == ("yes", 1)
        assert asyncio.all_tasks() == before, "the slow one is cancelled"
    assert server.requests[0].body == server.requests[1].body
    assert (len(server.requests), chat.stats.calls, chat.stats.hedged) == (2, 1, 1)
    assert (again, chat.stats.cached) == (result, 1)


@pytest.mark.parametrize("hedge_after_s", [None, 60.0])
async def test_a_request_that_is_quick_enough_is_alone(chat_for, sampling, hedge_after_s):
    async with OpenAIServer([Reply("x", delay_s=0.05)]) as server:
        chat = chat_for(server, hedge_after_s=hedge_after_s)
        await asyncio.gather(*(chat.complete(f"{i}", sampling) for i in range(5)))
    assert (len(server.requests), chat.stats.hedged) == (5, 0)


async def test_no_more_requests_than_slots_are_under_way(chat_for, sampling, requests_at_once):
    async with OpenAIServer([Reply("x", delay_s=0.1)]) as server:
        chat = chat_for(server, hedge_after_s=0.01, concurrency=2, measure=requests_at_once)
        await asyncio.gather(*(chat.complete(f"{i}", sampling) for i in range(8)))
        alone = chat_for(server, hedge_after_s=0.01, concurrency=1)
        assert (await alone.complete(PROMPT, sampling)).text == "x"
    assert requests_at_once.most == 2
    assert alone.stats.hedged == 0


async def test_a_double_that_never_had_its_turn_leaves_it_to_the_next(chat_for, sampling):
    async with OpenAIServer([Reply("x", delay_s=0.2)]) as server:
        chat = chat_for(server, hedge_after_s=0.01, requests_per_minute=1, tokens_per_minute=1e9)
        await chat.complete(PROMPT, sampling)
    assert (len(server.requests), chat.stats.hedged) == (1, 0)
    assert 0 < chat._requests.reserve(1, time.monotonic()) <= 60
    assert chat._tokens.reserve(1, time.monotonic()) == 0


async def test_each_request_is_measured(chat_for, sampling):
    def requests(outcome):
        labels = {"model": "hedged", "outcome": outcome}
        return REGISTRY.get_sample_value("asap_llm_requests_total", labels) or 0

    async with OpenAIServer([Stall(), Reply("yes")]) as server:
        chat = chat_for(server, model="hedged", hedge_after_s=0.05, measure=measure)
        await chat.complete(PROMPT, sampling)
    assert (requests("ok"), requests("cancelled")) == (1, 1)


async def test_failures_of_both_are_tried_again(chat_for, sampling):
    def failing(prompt, body):
        chat._hedge_after_s = PATIENCE_S  # the third one is alone
        return [Status(500), Status(503), Reply("yes")][len(server.requests) - 1]

    async with OpenAIServer(failing) as server:
        chat = chat_for(server, hedge_after_s=0.0)  # before the first can answer
        assert (await chat.complete(PROMPT, sampling)).text == "yes"
    assert (len(server.requests), chat.stats.retries) == (3, 1)


async def test_the_usage_of_both_is_known_when_both_have_answered():
    gate, loop = asyncio.Event(), asyncio.get_running_loop()

    def double():
        loop.call_soon(gate.set)
        return call("two", gate)

    result = await first_answer(call("one", gate), double, 0.001)
    assert result == ChatResult("one", "stop", COST + COST)


async def test_a_failure_waits_for_the_other():
    first, second = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for broken, whole in ((first, second), (second, first)):
        first.clear()
        second.clear()
        outcomes = [
            UpstreamTimeout("late") if gate is broken else "yes" for gate in (first, second)
        ]

        def double(outcome=outcomes[1], broken=broken, whole=whole):
            loop.call_later(0.03, broken.set)
            loop.call_later(0.06, whole.set)
            return call(outcome, second)

        result = await first_answer(call(outcomes[0], first), double, 0.001)
        assert (result.text, result.usage) == ("yes", COST)


async def test_without_an_answer_the_first_failure_is_raised():
    gate = asyncio.Event()
    asyncio.get_running_loop().call_later(0.05, gate.set)
    with pytest.raises(UpstreamTimeout, match="first"):
        await first_answer(
            call(UpstreamTimeout("first"), gate), lambda: call(UpstreamTimeout("second")), 0.001
        )
    with pytest.raises(UpstreamTimeout, match="at once"):
        await first_answer(call(UpstreamTimeout("at once")), lambda: call("never"), 5.0)


async def test_who_is_cancelled_takes_both_along():
    before = asyncio.all_tasks()
    never = asyncio.Event()
    waiting = asyncio.create_task(first_answer(call("a", never), lambda: call("b", never), 0.001))
    await until(lambda: len(asyncio.all_tasks() - before) == 3)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert asyncio.all_tasks() == before
