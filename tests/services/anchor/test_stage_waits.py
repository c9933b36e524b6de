"""Items whose calls the server wants later: they wait as rows, and no attempt is burnt."""

from __future__ import annotations

import asyncio
import random

import pytest

from anchor_job import COT, answer, run
from asap.config import PruneConfig
from asap.errors import UpstreamTimeout, UpstreamUnavailable
from asap.types import Record, Triple
from asap_anchor import stage as stage_module
from asap_anchor.limits import Pace
from asap_anchor.settings import AnchorSettings
from asap_anchor.stage import AnchorStage
from asap_runtime.stage import Done, Wait
from openai_batches import BatchServer
from openai_server import Body, Drop, OpenAIServer, Stall, Status
from waiting import PATIENCE_S, until


@pytest.fixture
def settings_for(tmp_path):
    def make(server, **llm):
        values = {"base_url": server.base_url, "model": "tiny", "timeout_s": PATIENCE_S} | llm
        return AnchorSettings(home=tmp_path / "home", llm=values)

    return make


@pytest.fixture
async def stage_for(settings_for):
    made = []

    async def make(server, **llm):
        stage = AnchorStage(settings_for(server, **llm))
        await stage.start()
        made.append(stage)
        # No retry: what the stage makes of a failure is the question here.
        if not llm.get("batch"):
            stage._chat._max_transport = 0
        return stage

    yield make
    for stage in made:
        await stage.stop()


def record(question="q"):
    config = PruneConfig(method="asap_stage1")
    return Record(triple=Triple(question=question, cot=COT, answer="sorted"), config=config)


@pytest.mark.parametrize("status", [429, 503])
async def test_an_item_waits_as_long_as_the_server_asks(stage_for, status):
    async with OpenAIServer([Status(status, retry_after="40")]) as server:
        result = await (await stage_for(server)).process(record())
    assert isinstance(result, Wait)
    assert result.payload == record()
    assert 40 <= result.seconds <= 48


async def test_a_time_far_away_is_waited_for_as_a_row_and_holds_no_slot(stage_for):
    async with OpenAIServer([Status(429, retry_after="3600")] * 7) as server:
        stage = await stage_for(server)
        stage._chat._max_transport = 6
        result = await stage.process(record())
        assert isinstance(result, Wait)
        assert 3600 <= result.seconds <= 4320
        assert len(server.requests) == 1


async def test_an_item_waits_where_no_time_is_named_and_never_in_a_tight_loop(stage_for):
    async with OpenAIServer([Status(429), Status(429, retry_after="0")]) as server:
        stage = await stage_for(server)
        seconds = [(await stage.process(record())).seconds for _ in range(2)]
    assert seconds[0] >= stage_module.WAIT_S
    assert 1 <= seconds[1] < 2


@pytest.mark.parametrize("limit", [{"requests_per_minute": 1.0}, {"tokens_per_minute": 100.0}])
async def test_items_beyond_the_rate_wait_as_rows_and_burn_no_attempt(
    stage_for, monkeypatch, limit
):
    monkeypatch.setattr(stage_module, "PATIENCE_S", 0.5)
    async with OpenAIServer(answer) as server:
        stage = await stage_for(server, item_timeout_s=PATIENCE_S, **limit)
        results = await asyncio.gather(*(stage.process(record(f"q{i}")) for i in range(6)))
        waiting = [result for result in results if isinstance(result, Wait)]
        assert len(waiting) == 6  # the first one has its direct CoT, and no turn for the next call
        assert all(result.seconds >= 1 for result in waiting)
        assert len(server.requests) == 1
        stage._chat._requests, stage._chat._tokens = Pace(None), Pace(None)  # the minute is over
        for one in waiting:
            assert isinstance(await stage.process(one.payload), Done)


async def test_items_beyond_the_slots_wait_as_rows(stage_for, monkeypatch):
    monkeypatch.setattr(stage_module, "PATIENCE_S", 0.2)
    async with OpenAIServer([Stall()]) as server:
        stage = await stage_for(server, concurrency=1)
        first = asyncio.create_task(stage.process(record("first")))
        await until(lambda: server.requests)
        second = await stage.process(record("second"))
        assert isinstance(second, Wait)
        assert len(server.requests) == 1
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


async def test_other_failures_are_attempts(stage_for):
    async with OpenAIServer([Status(500)]) as server:
        with pytest.raises(UpstreamUnavailable):
            await (await stage_for(server)).process(record())


async def test_all_calls_of_an_item_are_bounded_together(stage_for):
    async with OpenAIServer([Stall()]) as server:
        stage = await stage_for(server, item_timeout_s=0.1)
        with pytest.raises(UpstreamTimeout, match=r"0\.1 s"):
            await stage.process(record())


async def test_the_stage_is_not_ready_while_the_breaker_is_open(stage_for):
    async with OpenAIServer([Status(500)] * 20 + [answer("", {})]) as server:
        stage = await stage_for(server)
        await stage.ready()
        for _ in range(20):
            with pytest.raises(UpstreamUnavailable):
                await stage.process(record())
        with pytest.raises(UpstreamUnavailable, match="answered 500"):
            await stage.ready()
        waiting = await stage.process(record())
        assert isinstance(waiting, Wait)
        assert 0 < waiting.seconds <= 36
        assert len(server.requests) == 20
        stage._breaker._open_until = 0.0  # thirty seconds later
        await stage.process(record())
        await stage.ready()


async def test_without_a_server_the_stage_is_ready(tmp_path):
    stage = AnchorStage(AnchorSettings(home=tmp_path))
    await stage.start()
    await stage.ready()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
async def test_a_storm_of_every_fault_ends_with_every_item(settings_for, monkeypatch, seed):
    """The server fails, then four in ten calls do; the runner allows an item one failure."""
    rng = random.Random(seed)
    faults = [Status(429), Status(429, retry_after="0.05"), Status(503), Status(500), Stall(),
              Body(b"{"), Body(b'{"choices": ['), Drop(), Drop(after_headers=True)]  # fmt: skip

    def stormy(prompt, body):
        if len(server.requests) <= 24:
            return Status(500)
        return rng.choice(faults) if rng.random() < 0.4 else answer(prompt, body)

    monkeypatch.setattr(stage_module, "WAIT_S", 0.1)
    monkeypatch.setattr(stage_module, "LEAST_S", 0.05)
    async with OpenAIServer(stormy) as server:
        stage = AnchorStage(settings_for(server, timeout_s=1.0, concurrency=16))
        stage._breaker.OPEN_S = 0.2
        stage._breaker.PROBE_S = 0.05
        opened = []
        stage._breaker._on_change = opened.append
        start = stage.start

        async def quick():
            await start()
            stage._chat._backoff_base_s, stage._chat._backoff_cap_s = 0.02, 0.1

        stage.start = quick
        _, _, results = await run(stage._settings, [f"{i}" for i in range(60)], stage)
    assert [result.status for result in results] == ["succeeded"] * 60
    assert opened[0] is True
    assert not stage._breaker.is_open


async def test_a_job_without_credit_waits_and_goes_on_when_there_is_some(settings_for, monkeypatch):
    paid = asyncio.Event()

    def until_paid(prompt, body):
        return answer(prompt, body) if paid.is_set() else Status(429, code="insufficient_quota")

    async with OpenAIServer(until_paid) as server:
        stage = AnchorStage(settings_for(server))
        stage._breaker.OPEN_S = 0.1
        monkeypatch.setattr(stage_module, "WAIT_S", 0.05)
        monkeypatch.setattr(stage_module, "LEAST_S", 0.05)
        job = asyncio.create_task(run(stage._settings, ["a", "b", "c"], stage))
        await asyncio.to_thread(server.wait_for_requests, 4)  # more than attempts are allowed
        assert not job.done()
        paid.set()
        _, _, results = await asyncio.wait_for(job, PATIENCE_S)
    assert [result.status for result in results] == ["succeeded"] * 3


async def test_a_job_by_batches_waits_as_rows_and_costs_half(settings_for, monkeypatch):
    async with BatchServer(answer) as server:
        prices = {"price_in": 100.0, "price_out": 1000.0}
        settings = settings_for(server, batch=True, batch_period_s=0.05, **prices)
        job = asyncio.create_task(run(settings, ["a", "b", "c"]))
        while not job.done():
            server.work()
            await asyncio.sleep(0.02)
        view, _, results = await job
        assert len(server.paid()) == 4  # the coarse prompt of all three is the same one
        assert not server.requests
    assert [result.status for result in results] == ["succeeded"] * 3
    assert view.cost == 4 * 3000
    [one, *_] = [Record.model_validate_json(result.payload) for result in results]
    assert one.coarse.status == "accepted"


async def test_a_stage_with_batches_gives_its_slots_back_at_once(stage_for):
    async with BatchServer(answer) as server:
        stage = await stage_for(server, batch=True, batch_period_s=1000.0)
        results = await asyncio.gather(*(stage.process(record(f"{i}")) for i in range(50)))
    assert all(isinstance(result, Wait) and result.seconds > 1000 for result in results)
    assert not any(isinstance(result, Done) for result in results)
