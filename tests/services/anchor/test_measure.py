from __future__ import annotations

import asyncio

import pytest
from prometheus_client import REGISTRY

from asap.errors import UpstreamError
from asap_anchor.limits import Breaker
from asap_anchor.measure import measure, show_breaker
from openai_server import Body, OpenAIServer, Reply, Stall, Status
from waiting import until


def value(name, model, **labels):
    return REGISTRY.get_sample_value(name, {"model": model, **labels}) or 0.0


async def test_every_request_is_counted_with_its_outcome_and_replies_are_paid(chat_for, sampling):
    model = "counted"
    script = [Status(429), Body(b"<html>"), Reply("yes", usage=(1000, 500))]
    async with OpenAIServer(script) as server:
        chat = chat_for(server, model=model, measure=measure, price_in=2.0, price_out=4.0)
        assert (await chat.complete("planted prompt", sampling)).text == "yes"
    outcomes = {
        outcome: value("asap_llm_requests_total", model, outcome=outcome)
        for outcome in ("ok", "upstream-unavailable", "upstream-invalid", "cancelled")
    }
    assert outcomes == {
        "ok": 1, "upstream-unavailable": 1, "upstream-invalid": 1, "cancelled": 0
    }  # fmt: skip
    assert value("asap_llm_tokens_total", model, direction="prompt") == 1000
    assert value("asap_llm_tokens_total", model, direction="completion") == 500
    assert value("asap_llm_cost_total", model) == pytest.approx(0.004)
    assert value("asap_llm_seconds_count", model) == 3
    assert value("asap_upstream_inflight", model) == 0


async def test_a_final_refusal_has_its_code(chat_for, sampling):
    async with OpenAIServer([Status(401)]) as server:
        with pytest.raises(UpstreamError):
            await chat_for(server, model="refused", measure=measure).complete("p", sampling)
    assert value("asap_llm_requests_total", "refused", outcome="upstream-invalid") == 1


async def test_a_cancelled_request_is_in_flight_no_more(chat_for, sampling):
    async with OpenAIServer([Stall()]) as server:
        chat = chat_for(server, model="stalled", measure=measure)
        call = asyncio.create_task(chat.complete("p", sampling))
        await until(lambda: server.requests)
        assert value("asap_upstream_inflight", "stalled") == 1
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    assert value("asap_upstream_inflight", "stalled") == 0
    assert value("asap_llm_requests_total", "stalled", outcome="cancelled") == 1


def test_an_open_breaker_shows():
    def shown():
        return REGISTRY.get_sample_value("asap_breaker_open", {"upstream": "host:1"})

    breaker = Breaker(show_breaker("host:1"))
    assert shown() == 0
    breaker.trip("down", 0.0)
    assert shown() == 1
    breaker.end(None, 31.0, probe=breaker.begin())
    assert shown() == 0
