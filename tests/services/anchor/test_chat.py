"""OpenAIChat against a scripted server: retries, refusals, secrets, concurrency, cache."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import socket
import traceback

import pytest

from asap.errors import Misconfigured, UpstreamError, UpstreamTimeout, UpstreamUnavailable
from asap.types import Usage
from asap_anchor.cache import ReplyCache
from asap_anchor.chat import OPENAI_URL, OpenAIChat
from openai_server import Body, Drop, OpenAIServer, Reply, Stall, Status, Trickle

KEY = "sk-secret-0123456789"
PROMPT = "a private prompt"
SCHEMA = {"type": "object", "properties": {"keep": {"type": "array"}}, "required": ["keep"]}


def everything_about(error: BaseException) -> str:
    """All a log of this exception could show, its hidden causes included."""
    parts = []
    while error is not None:
        parts += [repr(error), str(vars(error)), *traceback.format_exception(error)]
        error = error.__cause__ or error.__context__
    return "\n".join(parts)


# What is asked, and what comes back


async def test_sends_one_user_message_with_all_decoding_parameters(chat_for, sampling):
    async with OpenAIServer([Reply("yes")]) as server:
        chat = chat_for(server)
        result = await chat.complete(PROMPT, sampling)

    assert result.text == "yes"
    assert chat.name == "tiny"
    assert server.requests[0].body == {
        "model": "tiny",
        "messages": [{"role": "user", "content": PROMPT}],
        "temperature": 2.0,
        "top_p": 1.0,
        "max_tokens": 64,
        "seed": 7,
    }
    assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("reason", ["stop", "length", "content_filter", "something new"])
async def test_passes_the_finish_reason_on(chat_for, sampling, reason):
    async with OpenAIServer([Reply("cut", finish_reason=reason)]) as server:
        result = await chat_for(server).complete(PROMPT, sampling)

    assert result.finish_reason == reason


async def test_counts_tokens_and_prices_them(chat_for, sampling):
    async with OpenAIServer([Reply("x", usage=(1_000_000, 500_000))]) as server:
        chat = chat_for(server, price_in=0.27, price_out=1.10)
        result = await chat.complete(PROMPT, sampling)

    assert result.usage.cost_usd == pytest.approx(0.27 + 0.55)
    assert result.usage.model_copy(update={"cost_usd": None}) == Usage(
        calls=1, prompt_tokens=1_000_000, completion_tokens=500_000
    )


@pytest.mark.parametrize("prices", [{}, {"price_in": 1.0}, {"price_out": 1.0}])
async def test_cost_is_unknown_without_both_prices(chat_for, sampling, prices):
    async with OpenAIServer([Reply("x")]) as server:
        result = await chat_for(server, **prices).complete(PROMPT, sampling)

    assert result.usage == Usage(calls=1, prompt_tokens=10, completion_tokens=5, cost_usd=None)


async def test_missing_usage_is_zero_tokens_at_unknown_cost(chat_for, sampling):
    async with OpenAIServer([Reply("x", usage=None)]) as server:
        result = await chat_for(server, price_in=1.0, price_out=1.0).complete(PROMPT, sampling)

    assert result.usage == Usage(calls=1)


@pytest.mark.parametrize("text", [None, ""])
async def test_null_and_empty_content_are_empty_text_and_not_retried(chat_for, sampling, text):
    async with OpenAIServer([Reply(text)]) as server:
        result = await chat_for(server).complete(PROMPT, sampling)

    assert result.text == ""
    assert len(server.requests) == 1


# Structured replies


async def test_asks_for_the_schema(chat_for, sampling):
    wanted = dataclasses.replace(sampling, json_schema=SCHEMA)
    async with OpenAIServer([Reply('{"keep": []}')]) as server:
        await chat_for(server).complete(PROMPT, wanted)

    assert server.requests[0].body["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "kept_steps", "strict": True, "schema": SCHEMA},
    }


async def test_a_server_without_schemas_is_asked_plainly_and_remembered(chat_for, sampling):
    wanted = dataclasses.replace(sampling, json_schema=SCHEMA)
    async with OpenAIServer([Reply("one"), Reply("two")], takes_schema=False) as server:
        chat = chat_for(server, max_transport=0)
        texts = [(await chat.complete(PROMPT, wanted)).text for _ in range(2)]

    assert texts == ["one", "two"]
    assert ["response_format" in r.body for r in server.requests] == [True, False, False]
    assert chat.stats.retries == 0


async def test_a_request_that_is_wrong_anyway_does_not_give_schemas_up(chat_for, sampling):
    wanted = dataclasses.replace(sampling, json_schema=SCHEMA)
    async with OpenAIServer([Status(400), Status(400), Reply("{}")]) as server:
        chat = chat_for(server)
        with pytest.raises(UpstreamError):
            await chat.complete(PROMPT, wanted)
        await chat.complete(PROMPT, wanted)

    assert ["response_format" in r.body for r in server.requests] == [True, False, True]


async def test_only_400_and_422_are_blamed_on_the_schema(chat_for, sampling):
    wanted = dataclasses.replace(sampling, json_schema=SCHEMA)
    async with OpenAIServer([Status(401)]) as server:
        with pytest.raises(UpstreamError):
            await chat_for(server).complete(PROMPT, wanted)

    assert len(server.requests) == 1


# Transport failures


@pytest.mark.parametrize(
    "fault",
    [
        *(Status(status) for status in (408, 409, 429, 500, 502, 503, 504, 529)),
        Drop(),
        Drop(after_headers=True),
        Body(b'{"choices": [{"mess'),
        Body(b"<html>bad gateway</html>", content_type="text/html"),
        Body(b""),
        Body(b"null"),
        Body(b'{"choices": []}'),
        Body(b'{"choices": [{"message": {"content": 7}}]}'),
        Body(b'{"choices": [{"message": {"content": "\\ud800"}}]}'),
        Body(b'{"error": {"message": "overloaded"}}'),
        Body(b'{"choices": [{"message": {"content": "\xff"}}]}'),
    ],
    ids=str,
)
async def test_a_transient_fault_is_retried(chat_for, sampling, fault):
    async with OpenAIServer([fault, fault, Reply("at last")]) as server:
        chat = chat_for(server)
        result = await chat.complete(PROMPT, sampling)

    assert result.text == "at last"
    assert result.usage.calls == 1
    assert (chat.stats.calls, chat.stats.retries) == (1, 2)
    assert chat.stats.waited_s > 0
    assert all(request.body == server.requests[0].body for request in server.requests)


@pytest.mark.parametrize("fault", [Stall(), Stall(after_headers=True), Trickle()], ids=str)
async def test_a_reply_that_never_ends_is_cut_and_retried(chat_for, sampling, fault):
    async with OpenAIServer([fault, Reply("at last")]) as server:
        result = await chat_for(server, timeout_s=0.3).complete(PROMPT, sampling)

    assert result.text == "at last"


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Status(429), UpstreamUnavailable),
        (Status(503), UpstreamUnavailable),
        (Drop(), UpstreamUnavailable),
        (Drop(after_headers=True), UpstreamUnavailable),
        (Stall(), UpstreamTimeout),
        (Trickle(), UpstreamTimeout),
        (Body(b"{"), UpstreamError),
        (Body(b"{}"), UpstreamError),
    ],
    ids=str,
)
async def test_retries_are_bounded(chat_for, sampling, fault, kind):
    async with OpenAIServer([fault]) as server:
        chat = chat_for(server, max_transport=2, timeout_s=0.2)
        with pytest.raises(kind) as caught:
            await chat.complete(PROMPT, sampling)

    assert type(caught.value) is kind
    assert len(server.requests) == 3
    assert "2 retries" in caught.value.detail


async def test_a_server_that_is_down_is_unavailable(chat_for, sampling):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    chat = chat_for(f"http://127.0.0.1:{port}/v1", max_transport=1)
    with pytest.raises(UpstreamUnavailable, match=str(port)) as caught:
        await chat.complete(PROMPT, sampling)

    assert caught.value.retryable


@pytest.mark.parametrize(
    "limit", [Status(429, retry_after="0.2"), Status(503, retry_after_ms="200")], ids=str
)
async def test_waits_as_long_as_the_server_asks(chat_for, sampling, limit):
    async with OpenAIServer([limit, Reply("x")]) as server:
        await chat_for(server).complete(PROMPT, sampling)

    first, second = (request.at_s for request in server.requests)
    assert 0.2 <= second - first < 2


async def test_never_waits_longer_than_the_cap(chat_for, sampling):
    async with OpenAIServer([Status(429, retry_after="3600"), Reply("x")]) as server:
        chat = chat_for(server, backoff_cap_s=0.1)
        await chat.complete(PROMPT, sampling)

    assert 0.1 <= chat.stats.waited_s < 0.2


async def test_the_last_refusal_says_how_long_to_wait(chat_for, sampling):
    async with OpenAIServer([Status(429, retry_after="30")]) as server:
        with pytest.raises(UpstreamUnavailable) as caught:
            await chat_for(server, max_transport=0).complete(PROMPT, sampling)

    assert caught.value.context["retry_after_s"] == 30
    assert caught.value.context["status"] == 429


async def waits_s(chat, sampling, calls=30):
    """Backoff of each of some calls that all fail."""
    waits = []
    for _ in range(calls):
        before = chat.stats.waited_s
        with pytest.raises(UpstreamUnavailable):
            await chat.complete(PROMPT, sampling)
        waits.append(chat.stats.waited_s - before)
    return waits


async def test_backoff_is_random_in_a_window_that_doubles(chat_for, sampling):
    async with OpenAIServer([Status(500)]) as server:
        chat = chat_for(server, max_transport=3, backoff_base_s=0.002, backoff_cap_s=1.0)
        waits = await waits_s(chat, sampling)

    assert 3 * 0.002 < max(waits) <= 0.002 + 0.004 + 0.008
    assert min(waits) < 0.9 * max(waits)


async def test_backoff_is_capped(chat_for, sampling):
    async with OpenAIServer([Status(500)]) as server:
        chat = chat_for(server, max_transport=3, backoff_base_s=0.002, backoff_cap_s=0.002)
        waits = await waits_s(chat, sampling)

    assert max(waits) <= 3 * 0.002 + 1e-9


# Refusals that no retry helps


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 413, 422])
async def test_other_client_errors_end_the_call_at_once(chat_for, sampling, status):
    async with OpenAIServer([Status(status)]) as server:
        with pytest.raises(UpstreamError, match=str(status)) as caught:
            await chat_for(server).complete(PROMPT, sampling)

    assert type(caught.value) is UpstreamError
    assert not caught.value.retryable
    assert caught.value.context["status"] == status
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "fault", [Status(401), Status(429), Stall(), Drop(), Body(PROMPT.encode())], ids=str
)
async def test_neither_key_nor_prompt_nor_reply_shows_in_an_error(chat_for, sampling, fault):
    async with OpenAIServer([fault]) as server:
        chat = chat_for(server, max_transport=1, timeout_s=0.2)
        with pytest.raises(UpstreamError) as caught:
            await chat.complete(PROMPT, sampling)

    shown = everything_about(caught.value)
    assert KEY not in shown
    assert PROMPT not in shown


async def test_the_key_does_not_show_in_the_client(chat_for):
    chat = chat_for("http://localhost:1/v1")

    assert KEY not in repr(chat)
    assert KEY not in str(vars(chat))


async def test_a_password_in_the_base_url_does_not_show(chat_for, sampling):
    async with OpenAIServer([Status(401)]) as server:
        chat = chat_for(server.base_url.replace("//", "//user:pass-word@"))
        with pytest.raises(UpstreamError) as caught:
            await chat.complete(PROMPT, sampling)

    assert "pass-word" not in everything_about(caught.value)


@pytest.mark.parametrize("key", ["", " \n", "two\nzzqq", "zzqqé", "\x00zzqq"])
async def test_a_key_that_http_cannot_carry_is_refused_at_the_start(chat_for, key):
    with pytest.raises(Misconfigured) as caught:
        chat_for("http://localhost:1/v1", api_key=key)

    assert "zzqq" not in everything_about(caught.value)


async def test_the_newline_that_a_key_file_ends_in_is_dropped(chat_for, sampling):
    async with OpenAIServer([Reply("x")]) as server:
        await chat_for(server, api_key=KEY + "\n").complete(PROMPT, sampling)

    assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    "base_url",
    ["/v1", "localhost:8000/v1", "ftp://h/v1", "http:///v1", "http://h:99999/v1", "http://[h/v1"],
)
async def test_a_base_url_that_cannot_work_is_refused_at_the_start(chat_for, base_url):
    with pytest.raises(Misconfigured):
        chat_for(base_url)


async def test_no_base_url_is_openai_itself(chat_for, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://elsewhere/v1")

    chat = chat_for(OPENAI_URL)
    default = OpenAIChat(base_url=None, api_key=KEY, model="tiny")
    await default.close()

    assert default._client.base_url == chat._client.base_url


# Many calls at once


async def test_no_more_calls_than_allowed_are_under_way(chat_for, sampling):
    async with OpenAIServer([Reply("x", delay_s=0.02)]) as server:
        chat = chat_for(server, concurrency=3)
        await asyncio.gather(*(chat.complete(f"{i}", sampling) for i in range(20)))

    assert server.max_concurrent == 3
    assert chat.stats.calls == 20


async def test_thirty_calls_in_a_storm_of_refusals_all_end(chat_for, sampling):
    async with OpenAIServer([Status(429)]) as server:
        chat = chat_for(server, max_transport=2)
        calls = (chat.complete(f"{i}", sampling) for i in range(30))
        results = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 20)

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


@pytest.mark.parametrize("script", [[Stall()], [Status(429, retry_after="60")]], ids=str)
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

        result = await asyncio.wait_for(chat.complete(PROMPT, sampling), 2)

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
