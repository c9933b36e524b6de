from __future__ import annotations

import asyncio

import pytest

from asap.errors import UpstreamUnavailable
from asap_gateway.waiting import Waits
from asap_runtime.views import Result
from waiting import PATIENCE_S, until


class Ledger:
    """Results by job id, and how often it was asked."""

    def __init__(self):
        self.results, self.looks, self.failing = {}, 0, False

    def single_results(self, wanted):
        self.looks += 1
        if self.failing:
            raise UpstreamUnavailable("away")
        return {job: result for job, result in self.results.items() if job in wanted}


@pytest.fixture
def ledger():
    return Ledger()


def result(text):
    return Result(0, 1, None, "succeeded", text.encode(), None)


async def test_each_hears_of_its_own_job_and_one_look_serves_all(ledger):
    waits = Waits(ledger, 100)
    waiting = [asyncio.create_task(waits.result("t", f"job-{i}", PATIENCE_S)) for i in range(50)]
    await until(lambda: ledger.looks > 3)
    looks = ledger.looks
    ledger.results = {f"job-{i}": result(str(i)) for i in range(50)}
    found = await asyncio.gather(*waiting)
    assert [one.payload for one in found] == [str(i).encode() for i in range(50)]
    assert ledger.looks - looks < 50


async def test_who_waits_too_long_hears_nothing_and_nobody_looks_any_more(ledger):
    waits = Waits(ledger, 100)
    assert await waits.result("t", "job", 0.03) is None
    await until(lambda: waits._poller.done())
    assert ledger.looks


async def test_beyond_the_limit_there_is_no_waiting(ledger):
    waits = Waits(ledger, 1)
    first = asyncio.create_task(waits.result("t", "a", PATIENCE_S))
    await until(lambda: ledger.looks)
    assert await waits.result("t", "b", PATIENCE_S) is None
    ledger.results["a"] = result("x")
    assert (await first).payload == b"x"


async def test_a_server_that_leaves_answers_now(ledger):
    waits = Waits(ledger, 10)
    waiting = asyncio.create_task(waits.result("t", "a", 3600))
    await until(lambda: ledger.looks)
    waits.stop()
    async with asyncio.timeout(PATIENCE_S):
        assert await waiting is None
    assert await waits.result("t", "b", 3600) is None


async def test_a_database_that_is_away_for_a_moment_is_asked_again(ledger):
    waits, ledger.failing = Waits(ledger, 10), True
    waiting = asyncio.create_task(waits.result("t", "a", PATIENCE_S))
    await until(lambda: ledger.looks > 2)
    ledger.failing, ledger.results["a"] = False, result("x")
    assert (await waiting).payload == b"x"
