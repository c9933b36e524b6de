"""OpenAIChat against a scripted server: what is asked, what comes back, what is tried again."""

from __future__ import annotations

import dataclasses

import pytest

from asap.errors import UpstreamError, UpstreamTimeout, UpstreamUnavailable
from asap.types import Usage
from openai_server import Body, Drop, OpenAIServer, Reply, Stall, Status, Trickle
from waiting import PATIENCE_S, free_port

KEY = "sk-secret-0123456789"
PROMPT = "a private prompt"
SCHEMA = {"type": "object", "properties": {"keep": {"type": "array"}}, "required": ["keep"]}


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


async def test_tokens_of_the_prefix_cache_have_their_own_price(chat_for, sampling):
    async with OpenAIServer([Reply("x", usage=(1_000_000, 0), cached=600_000)]) as server:
        chat = chat_for(server, price_in=1.0, price_out=1.0, price_cached=0.1)
        result = await chat.complete(PROMPT, sampling)

    assert result.usage.cached_tokens == 600_000
    assert result.usage.cost_usd == pytest.approx(0.4 + 0.06)


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


async def test_the_newer_name_of_the_reply_bound_is_found_and_remembered(chat_for, sampling):
    def newer(prompt, body):
        refused = Status(400, code="unsupported_parameter", param="max_tokens")
        return refused if "max_tokens" in body else Reply("yes")

    async with OpenAIServer(newer) as server:
        chat = chat_for(server)
        texts = [(await chat.complete(PROMPT, sampling)).text for _ in range(2)]

    assert texts == ["yes", "yes"]
    assert ["max_completion_tokens" in r.body for r in server.requests] == [False, True, True]
    assert server.requests[-1].body["max_completion_tokens"] == 64


async def test_a_server_may_want_both_changes(chat_for, sampling):
    def picky(prompt, body):
        if "max_tokens" in body:
            return Status(400, param="max_tokens")
        return Status(400) if "response_format" in body else Reply("{}")

    wanted = dataclasses.replace(sampling, json_schema=SCHEMA)
    async with OpenAIServer(picky) as server:
        chat = chat_for(server)
        for _ in range(2):
            assert (await chat.complete(PROMPT, wanted)).text == "{}"

    assert len(server.requests) == 4


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
        timeout_s = 0.3 if kind is UpstreamTimeout else PATIENCE_S
        chat = chat_for(server, max_transport=2, timeout_s=timeout_s)
        with pytest.raises(kind) as caught:
            await chat.complete(PROMPT, sampling)

    assert type(caught.value) is kind
    assert (chat.stats.calls, chat.stats.retries) == (1, 2)
    assert "2 retries" in caught.value.detail


async def test_a_server_that_is_down_is_unavailable(chat_for, sampling):
    port = free_port()

    chat = chat_for(f"http://127.0.0.1:{port}/v1", max_transport=1)
    with pytest.raises(UpstreamUnavailable, match=str(port)) as caught:
        await chat.complete(PROMPT, sampling)

    assert caught.value.retryable


@pytest.mark.parametrize(
    "limit", [Status(429, retry_after="0.2"), Status(503, retry_after_ms="200")], ids=str
)
async def test_waits_as_long_as_the_server_asks(chat_for, sampling, limit):
    async with OpenAIServer([limit, Reply("x")]) as server:
        chat = chat_for(server)
        await chat.complete(PROMPT, sampling)

    first, second = (request.at_s for request in server.requests)
    assert second - first >= 0.2
    assert 0.2 <= chat.stats.waited_s < 0.3


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
