from __future__ import annotations

import json

import pytest

from asap.estimate import Prices
from asap.ports import Sampling
from asap.types import Usage
from asap_anchor.wire import Dialect, Refusal, chat_body, read_reply

SAMPLING = Sampling(temperature=2.0, max_tokens=64, seed=7, json_schema={"type": "object"})


def reply(**usage):
    choice = {"message": {"content": "x"}, "finish_reason": "stop"}
    return json.dumps({"choices": [choice], "usage": usage}).encode()


def test_a_body_speaks_the_dialect():
    plain = chat_body("m", "p", SAMPLING, Dialect(schema=False, length="max_completion_tokens"))
    assert "response_format" not in plain
    assert "max_tokens" not in plain
    assert plain["max_completion_tokens"] == 64
    rich = chat_body("m", "p", SAMPLING, Dialect())
    assert rich["max_tokens"] == 64
    assert rich["response_format"]["json_schema"]["schema"] == {"type": "object"}


def test_a_dialect_gives_up_what_was_refused_then_the_schema_then_nothing():
    first = Dialect()
    second = first.plainer("max_tokens", structured=True)
    assert second == Dialect(length="max_completion_tokens")
    third = second.plainer("max_tokens", structured=True)
    assert third == Dialect(schema=False, length="max_completion_tokens")
    assert third.plainer("max_tokens", structured=True) is None
    assert first.plainer(None, structured=False) is None


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b'{"error": {"code": "insufficient_quota", "type": "t"}}', "insufficient_quota", ""),
        (b'{"error": {"code": null, "type": "insufficient_quota"}}', "insufficient_quota", ""),
        (b'{"error": {"code": 400, "param": "max_tokens"}}', "400", "max_tokens"),
        (b'{"error": "text"}', "", ""),
        (b'{"detail": []}', "", ""),
        (b"<html>", "", ""),
        (b"\xff", "", ""),
        (b"", "", ""),
    ],
    ids=str,
)
def test_error_bodies_are_read_tolerantly(body, code, param):
    assert Refusal.read(body) == Refusal(code, param)


def test_cached_tokens_are_counted_and_cost_their_own_price():
    body = reply(
        prompt_tokens=1000, completion_tokens=100, prompt_tokens_details={"cached_tokens": 600}
    )
    usage = read_reply(body, Prices(2.0, 8.0, price_cached=0.5)).usage
    assert usage.cost_usd == pytest.approx((400 * 2.0 + 600 * 0.5 + 100 * 8.0) / 1e6)
    assert usage.model_copy(update={"cost_usd": None}) == Usage(
        calls=1, prompt_tokens=1000, cached_tokens=600, completion_tokens=100
    )
    batched = read_reply(body, Prices(2.0, 8.0, price_cached=0.5), batch=True).usage
    assert batched.cost_usd == pytest.approx(usage.cost_usd / 2)


@pytest.mark.parametrize("details", [None, {}, {"cached_tokens": None}, {"cached_tokens": 99}])
def test_odd_cache_counts_never_make_a_cost_negative(details):
    body = reply(prompt_tokens=10, completion_tokens=0, prompt_tokens_details=details)
    usage = read_reply(body, Prices(1.0, 1.0, price_cached=0.0)).usage
    assert 0 <= usage.cached_tokens <= 10
    assert usage.cost_usd >= 0


def test_the_cached_tokens_of_deepseek_are_counted():
    body = reply(
        prompt_tokens=1000,
        completion_tokens=0,
        prompt_cache_hit_tokens=600,
        prompt_cache_miss_tokens=400,
    )
    usage = read_reply(body, Prices(2.0, 8.0, price_cached=0.5)).usage
    assert usage.cached_tokens == 600
    assert usage.cost_usd == pytest.approx((400 * 2.0 + 600 * 0.5) / 1e6)


@pytest.mark.parametrize("odd", [None, -5])
def test_odd_counts_do_not_spoil_the_reply_that_was_paid(odd):
    details = {"cached_tokens": odd}
    body = reply(prompt_tokens=odd, completion_tokens=odd, prompt_tokens_details=details)
    assert read_reply(body, None).usage == Usage(calls=1)
