"""OpenAIChat with many calls at once, and with a cache."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import threading
import time

import pytest

from asap.errors import UpstreamError, UpstreamUnavailable
from asap_anchor.cache import ReplyCache
from asap_anchor.chat import OpenAIChat
from asap_anchor.limits import Breaker
from openai_server import OpenAIServer, Reply, Stall, Status
from waiting import PATIENCE_S

KEY = "sk-secret-0123456789"
PROMPT = "a private prompt"


# Many calls at once


async def test_no_more_calls_than_allowed_are_under_way(chat_for, sampling, requests_at_once):
    async with OpenAIServer([Reply("x", delay_s=0.02)]) as server:
        chat = chat_for(server, concurrency=3, measure=requests_at_once)
        await asyncio.gather(*(chat.complete(f"{i}", sampling) for i in range(20)))

    assert requests_at_once.most == 3
    assert server.max_concurrent <= 3
    assert chat.stats.calls == 20


async def test_thirty_calls_in_a_storm_of_refusals_all_end(chat_for, sampling):
    async with OpenAIServer([Status(429)]) as server:
        chat = chat_for(server, max_transport=2)
        calls = (chat.complete(f"{i}", sampling) for i in range(30))
        results = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), PATIENCE_S)

    assert {type(result) for result in results} == {UpstreamUnavailable}
    assert len(server.requests) == 90
    assert chat.stats.retries == 60


async def test_thirty_calls_outlive_a_storm_that_ends(chat_for, sampling):
    script = [Status(429, retry_after="0.05")] * 40 + [Reply("x")]
    async with OpenAIServer(script) as server:
        chat = chat_for(server, max_transport=40)
        results = await asyncio.gather(*(chat.complete(f"{i}", sampling) for i in range(30)))

    assert [result.text for result in results] == ["x"] * 30
    assert len(server.requests) == 70


@pytest.mark.parametrize("script", [[Stall()], [Status(429, retry_after="5")]], ids=str)
async def test_cancelled_calls_leave_nothing_behind(chat_for, sampling, script, tmp_path):
    async with OpenAIServer(script) as server:
        chat = chat_for(server, concurrency=2, backoff_cap_s=60.0, cache=ReplyCache(tmp_path))
        before = asyncio.all_tasks()
        calls = [asyncio.create_task(chat.complete(f"{i}", sampling)) for i in range(5)]
        await asyncio.to_thread(server.wait_for_requests, 2)
        for call in calls:
            call.cancel()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)

        assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
        assert asyncio.all_tasks() == before
        assert list(tmp_path.iterdir()) == []

        server.script = [Reply("free again")]
        result = await asyncio.gather(*(chat.complete(f"{i}", sampling) for i in range(2)))
        assert [r.text for r in result] == ["free again"] * 2


async def test_close_releases_the_connections(sampling):
    async with OpenAIServer([Reply("x")]) as server:
        chat = OpenAIChat(base_url=server.base_url, api_key=KEY, model="tiny")
        await chat.complete(PROMPT, sampling)
        await chat.close()
        del chat
        gc.collect()  # an open socket would warn here, and a warning fails the test


async def test_refusals_lower_the_calls_at_once_and_the_work_still_ends(chat_for, sampling):
    """A server that takes none at first, then four calls at a time, and refuses the rest."""

    def four_at_a_time(prompt, body):
        refused = len(server.requests) <= 40 or server._concurrent > 4
        return Status(429) if refused else Reply("x", delay_s=0.02)

    async with OpenAIServer(four_at_a_time) as server:
        chat = chat_for(server, concurrency=32, max_transport=50, backoff_cap_s=0.05)
        await asyncio.gather(*(chat.complete(f"{i}", sampling) for i in range(200)))

    refused = chat.stats.retries
    assert 40 <= refused < 200
    assert chat._limit.value < 16  # cut twice: by the first 32, and by those that came again


async def test_calls_are_spread_over_the_minute(chat_for, sampling):
    async with OpenAIServer([Reply("x")]) as server:
        chat = chat_for(server, requests_per_minute=60 / 0.2)
        began = time.monotonic()
        await asyncio.gather(*(chat.complete(f"{i}", sampling) for i in range(6)))

    times = sorted(request.at_s for request in server.requests)
    assert len(times) == 6
    assert all(at - began >= 0.2 * turn - 0.01 for turn, at in enumerate(times))


async def test_tokens_of_replies_count_for_the_calls_that_follow(chat_for, sampling):
    async with OpenAIServer([Reply("x", usage=(0, 100))]) as server:
        chat = chat_for(server, tokens_per_minute=100 * 60 / 0.5)
        began = time.monotonic()
        for _ in range(3):
            await chat.complete("", sampling)

    times = [request.at_s for request in server.requests]
    assert len(times) == 3
    assert all(at - began >= 0.5 * turn - 0.01 for turn, at in enumerate(times))


async def test_a_named_time_holds_all_calls_back(chat_for, sampling):
    script = [Status(429, retry_after="0.3"), Reply("x")]
    async with OpenAIServer(script) as server:
        chat = chat_for(server)
        first = asyncio.create_task(chat.complete("first", sampling))
        while not chat.stats.retries:  # noqa: ASYNC110 - until the refusal was read
            await asyncio.sleep(0.005)
        await chat.complete("second", sampling)
        await first

    refused, *others = (request.at_s for request in server.requests)
    assert len(others) == 2
    assert min(others) - refused >= 0.3


async def test_five_hundred_calls_are_in_flight_without_a_thread_for_any(chat_for, sampling):
    before = threading.active_count()
    async with OpenAIServer([Stall()]) as server:
        chat = chat_for(server, concurrency=500)
        calls = [asyncio.create_task(chat.complete(f"{i}", sampling)) for i in range(500)]
        await asyncio.to_thread(server.wait_for_requests, 500)
        assert server.max_concurrent == 500
        assert threading.active_count() <= before + 8
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


# The breaker


async def test_an_open_breaker_ends_retries_and_tries_no_call(chat_for, sampling):
    async with OpenAIServer([Status(500)]) as server:
        chat = chat_for(server, breaker=Breaker(), max_transport=30, concurrency=2)
        outcomes = await asyncio.gather(
            *(chat.complete(f"{i}", sampling) for i in range(30)), return_exceptions=True
        )
        asked = len(server.requests)

    assert asked <= 22
    assert all(isinstance(o, UpstreamUnavailable) and o.context["waits"] for o in outcomes)
    assert all(0 < o.context["retry_after_s"] <= 30 for o in outcomes)


async def test_the_probe_closes_the_breaker(chat_for, sampling):
    async with OpenAIServer([Status(500), Reply("x")]) as server:
        breaker = Breaker()
        breaker.trip("down", time.monotonic())
        chat = chat_for(server, breaker=breaker, max_transport=0)
        with pytest.raises(UpstreamUnavailable):
            await chat.complete("resting", sampling)
        assert not server.requests
        for expected in ("fails", "works"):
            breaker._open_until = 0.0  # thirty seconds later
            if expected == "fails":
                with pytest.raises(UpstreamUnavailable):
                    await chat.complete("probe", sampling)
            else:
                assert (await chat.complete("probe", sampling)).text == "x"
            assert breaker.is_open == (expected == "fails")


async def test_too_many_calls_are_no_reason_to_open(chat_for, sampling):
    breaker = Breaker()
    async with OpenAIServer([Status(429)] * 40 + [Reply("x")]) as server:
        chat = chat_for(server, breaker=breaker, max_transport=40)
        await asyncio.gather(*(chat.complete(f"{i}", sampling) for i in range(30)))

    assert not breaker.is_open


@pytest.mark.parametrize("status", [Status(402), Status(429, code="insufficient_quota")], ids=str)
async def test_an_account_without_credit_opens_at_once(chat_for, sampling, status):
    breaker = Breaker()
    async with OpenAIServer([status]) as server:
        chat = chat_for(server, breaker=breaker)
        for _ in range(3):
            with pytest.raises(UpstreamUnavailable, match="credit"):
                await chat.complete(PROMPT, sampling)

    assert len(server.requests) == 1
    assert breaker.is_open


async def test_a_cancelled_probe_lets_the_next_one_in(chat_for, sampling):
    async with OpenAIServer([Stall(), Reply("x")]) as server:
        breaker = Breaker()
        breaker.OPEN_S = 0.0
        breaker.trip("down", time.monotonic())
        chat = chat_for(server, breaker=breaker)
        probe = asyncio.create_task(chat.complete("probe", sampling))
        await asyncio.to_thread(server.wait_for_requests, 1)
        probe.cancel()
        await asyncio.gather(probe, return_exceptions=True)
        assert (await chat.complete("next", sampling)).text == "x"


# The cache


async def test_a_cached_reply_is_identical_and_costs_no_request(chat_for, sampling, tmp_path):
    async with OpenAIServer([Reply("first"), Reply("second")]) as server:
        prices = {"price_in": 0.27, "price_out": 1.1}
        cold = chat_for(server, cache=ReplyCache(tmp_path), **prices)
        one = await cold.complete(PROMPT, sampling)
        warm = chat_for(server, cache=ReplyCache(tmp_path))
        two = await warm.complete(PROMPT, sampling)

    assert one == two
    assert len(server.requests) == 1
    assert (cold.stats.calls, cold.stats.cached) == (1, 0)
    assert (warm.stats.calls, warm.stats.cached) == (0, 1)


async def test_each_seed_is_a_fresh_sample(chat_for, sampling, tmp_path):
    async with OpenAIServer([Reply("first"), Reply("second")]) as server:
        chat = chat_for(server, cache=ReplyCache(tmp_path))
        one = await chat.complete(PROMPT, sampling)
        two = await chat.complete(PROMPT, dataclasses.replace(sampling, seed=8))

    assert (one.text, two.text) == ("first", "second")


async def test_equal_questions_at_once_are_asked_once(chat_for, sampling, tmp_path):
    replies = (Reply(f"{i}", delay_s=0.02) for i in range(9))
    async with OpenAIServer(lambda prompt, body: next(replies)) as server:
        chat = chat_for(server, cache=ReplyCache(tmp_path))
        results = await asyncio.gather(*(chat.complete(PROMPT, sampling) for _ in range(8)))

    assert [result.text for result in results] == ["0"] * 8
    assert (chat.stats.calls, chat.stats.cached) == (1, 7)


async def test_a_cached_reply_waits_for_no_slot(chat_for, sampling, tmp_path):
    async with OpenAIServer([Reply("x"), Stall()]) as server:
        chat = chat_for(server, cache=ReplyCache(tmp_path), concurrency=1)
        await chat.complete(PROMPT, sampling)
        stalled = asyncio.create_task(chat.complete("another", sampling))
        await asyncio.to_thread(server.wait_for_requests, 2)

        result = await asyncio.wait_for(chat.complete(PROMPT, sampling), PATIENCE_S / 2)

        assert result.text == "x"
        stalled.cancel()
        await asyncio.gather(stalled, return_exceptions=True)


async def test_errors_are_never_kept(chat_for, sampling, tmp_path):
    async with OpenAIServer([Status(401), Reply("x")]) as server:
        chat = chat_for(server, cache=ReplyCache(tmp_path))
        with pytest.raises(UpstreamError):
            await chat.complete(PROMPT, sampling)
        assert list(tmp_path.iterdir()) == []

        assert (await chat.complete(PROMPT, sampling)).text == "x"


async def test_a_damaged_cache_file_is_asked_again(chat_for, sampling, tmp_path):
    async with OpenAIServer([Reply("first"), Reply("second")]) as server:
        chat = chat_for(server, cache=ReplyCache(tmp_path))
        await chat.complete(PROMPT, sampling)
        (path,) = tmp_path.glob("*/*.json")
        path.write_bytes(path.read_bytes()[:20])

        texts = [(await chat.complete(PROMPT, sampling)).text for _ in range(2)]

    assert texts == ["second", "second"]
