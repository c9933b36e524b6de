"""The anchor stage in the platform: real HTTP to a scripted server with a price, real booking."""

from __future__ import annotations

import asyncio

import pytest

from asap.config import PruneConfig
from asap.types import Record, Triple
from asap_anchor.settings import AnchorSettings
from asap_anchor.stage import AnchorStage
from asap_runtime.host import StageHost, open_database
from asap_runtime.intake import JobIntake
from asap_runtime.ledger import JobLedger
from asap_runtime.queue import BATCH, MemoryQueue
from asap_runtime.stage import RunnerLimits
from asap_runtime.values import NewItem
from openai_server import Body, OpenAIServer, Reply, Status

PRICES = {"price_in": 100.0, "price_out": 1000.0}
"""US dollars per million tokens: a reply of (10, 5) tokens costs 6,000 micro-dollars."""
PAID = 6000
COT = "first we read the list\n\nthen we sort it\n\nthen we print the list"


@pytest.fixture
def settings_for(tmp_path):
    def make(server, **llm):
        values = {"base_url": server.base_url, "model": "tiny", "timeout_s": 5.0} | PRICES | llm
        return AnchorSettings(home=tmp_path / "home", llm=values)

    return make


def answer(prompt, body):
    """Accepted at once; the prompt of the direct CoT is the one without the trace."""
    return Reply("then we sort it" if COT.split("\n\n", maxsplit=1)[0] in prompt else "sort it")


async def run(settings, questions, **config):
    """A job of these questions through the anchor stage alone: its view, items and results."""
    database = open_database(settings)
    intake, ledger = JobIntake(database), JobLedger(database)
    config = PruneConfig(method="asap_stage1", **config)
    host = StageHost(
        database,
        MemoryQueue(),
        [AnchorStage(settings)],
        limits=RunnerLimits(max_attempts=2, backoff_base_s=0.01),
        sweep_period_s=0.05,
    )
    async with host:
        job = intake.create_job("t", "prune", {}, BATCH)
        triples = [Triple(question=question, cot=COT, answer="sorted") for question in questions]
        records = [Record(triple=triple, config=config) for triple in triples]
        payloads = [record.model_dump_json().encode() for record in records]
        intake.add_items(job, (NewItem(n, "anchor", p) for n, p in enumerate(payloads, 1)))
        intake.mark_ingested(job)
        for _ in range(1500):
            if ledger.job("t", job).phase == "done":
                break
            await asyncio.sleep(0.02)
    view = ledger.job("t", job)
    assert view.phase == "done"
    items, results = ledger.items("t", job), list(ledger.results("t", job))
    database.close()
    return view, items, results


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
