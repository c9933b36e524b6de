"""The anchor stage in the platform: real HTTP to a scripted server with a price, real booking."""

from __future__ import annotations

import pytest

from anchor_job import answer, run
from asap.types import Record
from asap_anchor.settings import AnchorSettings, LLMSettings
from openai_server import Body, OpenAIServer, Reply, Status
from waiting import PATIENCE_S

PRICES = {"price_in": 100.0, "price_out": 1000.0}
"""US dollars per million tokens: a reply of (10, 5) tokens costs 6,000 micro-dollars."""
PAID = 6000


@pytest.fixture
def settings_for(tmp_path):
    def make(server, **llm):
        values = (
            {"base_url": server.base_url, "model": "tiny", "timeout_s": PATIENCE_S} | PRICES | llm
        )
        return AnchorSettings(home=tmp_path / "home", llm=values)

    return make


async def test_an_item_costs_what_its_calls_cost(settings_for):
    async with OpenAIServer(answer) as server:
        view, items, results = await run(settings_for(server), ["a", "b", "c"])
        assert len(server.requests) == 4  # the coarse prompt of all three is the same one
    assert [result.status for result in results] == ["succeeded"] * 3
    assert sorted(item.cost for item in items) == [PAID, PAID, 2 * PAID]
    assert view.cost == 4 * PAID
    [one, *_] = [Record.model_validate_json(result.payload) for result in results]
    assert one.coarse.usage.cost_usd * 1e6 == pytest.approx(2 * PAID)  # what it took, paid or not


async def test_replies_from_the_cache_cost_nothing(settings_for):
    async with OpenAIServer(answer) as server:
        settings = settings_for(server)
        first, _, before = await run(settings, ["a", "b"])
        asked = len(server.requests)
        second, _, after = await run(settings, ["a", "b"])
        assert len(server.requests) == asked
    assert (first.cost, second.cost) == (3 * PAID, 0)
    assert [r.payload for r in before] == [r.payload for r in after]


async def test_refused_replies_of_a_failed_item_are_booked(settings_for):
    async with OpenAIServer([Reply("something else altogether, not of this list")]) as server:
        view, [item], [result] = await run(
            settings_for(server), ["a"], on_fail="drop", max_attempts=3
        )
        assert len(server.requests) == 4
    assert result.problem.code == "coarse-exhausted"
    assert view.cost == item.cost == 4 * PAID


async def test_what_was_paid_before_a_failure_is_booked(settings_for):
    calls = []

    def flaky(prompt, body):
        calls.append(prompt)
        return Status(400) if len(calls) == 2 else answer(prompt, body)

    async with OpenAIServer(flaky) as server:
        view, [item], [result] = await run(settings_for(server), ["a"])
    assert result.problem.code == "upstream-invalid"
    assert view.cost == item.cost == PAID


async def test_what_is_no_reply_costs_nothing(settings_for):
    async with OpenAIServer([Status(401), Body(b"{}")]) as server:
        view, _, [result] = await run(settings_for(server), ["a"])
    assert result.problem.code == "upstream-invalid"
    assert view.cost == 0


async def test_without_prices_nothing_is_booked(settings_for):
    async with OpenAIServer(answer) as server:
        view, _, [result] = await run(settings_for(server, price_in=None), ["a"])
    assert result.status == "succeeded"
    assert view.cost == 0


def test_an_estimate_has_the_prices_of_the_way_that_calls_are_sent():
    known = {"price_in": 2.0, "price_out": 8.0, "price_batch_share": 0.25}
    assert LLMSettings().planned_prices is None
    assert LLMSettings(**known).planned_prices.usd(1_000_000, 0) == 2.0
    assert LLMSettings(**known, batch=True).planned_prices.usd(1_000_000, 0) == 0.5
