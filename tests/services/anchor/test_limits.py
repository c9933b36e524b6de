"""Limits on a clock of the test's own; only `Slots` waits, and for nobody's clock."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asap_anchor.limits import AdaptiveLimit, Breaker, Pace, Slots
from waiting import PATIENCE_S


def answer(limit, times, *, seconds=1.0, now=0.0, kind="k"):
    for _ in range(times):
        limit.answered(kind, began=now - seconds, now=now)


# Calls at once


def test_a_refusal_halves_and_fifty_good_answers_give_one_back():
    limit = AdaptiveLimit(64)
    limit.refused(began=0, now=1)
    assert limit.value == 32
    answer(limit, 49, now=10)
    assert limit.value == 32
    answer(limit, 1, now=10)
    assert limit.value == 33


def test_a_burst_of_refusals_halves_once_and_later_ones_again():
    limit = AdaptiveLimit(64)
    for _ in range(40):
        limit.refused(began=0, now=1)
    assert limit.value == 32
    limit.refused(began=1.5, now=2)
    assert limit.value == 16


def test_the_limit_stays_between_one_and_its_ceiling():
    limit = AdaptiveLimit(3)
    answer(limit, 1000, now=5)
    assert limit.value == 3
    for now in range(10):
        limit.refused(began=now, now=now + 1)
    assert limit.value == 1


def test_clearly_rising_latency_halves_once_and_is_then_the_new_measure():
    limit = AdaptiveLimit(25)
    answer(limit, 100, seconds=1.0, now=10)
    answer(limit, 50, seconds=1.9, now=20)
    assert limit.value == 25
    answer(limit, 50, seconds=2.5, now=30)
    assert limit.value == 12
    answer(limit, 500, seconds=2.5, now=100)
    assert limit.value >= 12


def test_questions_of_different_kinds_are_not_compared():
    limit = AdaptiveLimit(25)
    answer(limit, 50, seconds=1.0, now=10, kind="short")
    answer(limit, 50, seconds=30.0, now=100, kind="long")
    assert limit.value == 25


def test_the_quick_ones_of_calls_that_began_together_are_no_measure():
    """500 calls begin at once and take 0.1 to 0.3 s: the first 50 take half of the last 50."""
    rng = random.Random(1)
    limit = AdaptiveLimit(500)
    for wave in range(10):
        for seconds in sorted(rng.uniform(0.1, 0.3) for _ in range(500)):
            limit.answered("k", began=wave, now=wave + seconds)
    assert limit.value == 500


# Calls and tokens per minute


def test_requests_are_spread_evenly():
    pace = Pace(60)
    assert [pace.reserve(1, now=5.0) for _ in range(3)] == [0.0, 1.0, 2.0]
    assert pace.reserve(1, now=100.0) == 0.0


def test_units_that_were_not_reserved_are_waited_for_later():
    pace = Pace(600)
    pace.reserve(10, now=0.0)
    pace.correct(+20)
    assert pace.reserve(10, now=0.0) == pytest.approx(3.0)
    pace.correct(-10)
    assert pace.reserve(1, now=0.0) == pytest.approx(3.0)


def test_without_a_limit_only_a_pause_makes_wait():
    pace = Pace(None)
    assert [pace.reserve(1000, now=1.0) for _ in range(3)] == [0.0] * 3
    pace.pause(until=5.0)
    assert pace.reserve(1, now=1.0) == 4.0
    assert pace.reserve(1, now=6.0) == 0.0


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 50)), min_size=1, max_size=60))
def test_no_minute_holds_more_than_its_share(calls):
    pace, now, starts = Pace(100), 0.0, []
    for gap, units in calls:
        now += gap
        starts.append((now + pace.reserve(units, now), units))
    for begin, first in starts:
        within = sum(units for start, units in starts if begin <= start < begin + 60)
        assert within <= 100 + first + 50


# The breaker


def opened(failures=10, good=10):
    breaker = Breaker()
    for i in range(good + failures):
        breaker.end(None if i < good else "down", 0.0, probe=breaker.begin())
    return breaker


def test_opens_at_half_of_twenty_and_not_before():
    assert not opened(failures=9, good=11).is_open
    assert not opened(failures=19, good=0).is_open
    assert opened(failures=10, good=10).is_open
    assert opened().reason == "down"


def test_a_success_does_not_open_it_whatever_was_before():
    breaker = Breaker()
    for i in range(20):
        breaker.end("down" if i < 19 else None, 0.0, probe=False)
    assert not breaker.is_open


def test_one_probe_after_thirty_seconds_and_the_others_wait():
    breaker = opened()
    assert breaker.wait_s(10.0) == 20.0
    assert breaker.wait_s(30.0) == 0.0
    assert breaker.begin()
    assert breaker.wait_s(30.0) > 0
    breaker.end(None, 31.0, probe=True)
    assert not breaker.is_open
    assert breaker.wait_s(31.0) == 0.0
    assert not breaker.begin()


def test_a_probe_that_fails_opens_it_for_thirty_more():
    breaker = opened()
    assert breaker.begin()
    breaker.end("still down", 30.0, probe=True)
    assert breaker.wait_s(31.0) == 29.0
    assert breaker.reason == "still down"


def test_a_probe_that_is_given_up_lets_the_next_one_in():
    breaker = opened()
    assert breaker.begin()
    breaker.cancelled(probe=True)
    assert breaker.wait_s(30.0) == 0.0


def test_what_began_before_it_opened_neither_closes_nor_prolongs_it():
    breaker = opened()
    breaker.end(None, 5.0, probe=False)
    breaker.end("down", 25.0, probe=False)
    assert breaker.is_open
    assert breaker.wait_s(29.0) == 1.0


def test_old_failures_are_forgotten_when_it_closes():
    breaker = opened()
    breaker.end(None, 31.0, probe=breaker.begin())
    for _ in range(19):
        breaker.end("down", 32.0, probe=False)
    assert not breaker.is_open


def test_changes_are_told_once_each():
    told = []
    breaker = Breaker(told.append)
    breaker.trip("no credit", 0.0)
    breaker.trip("no credit", 1.0)
    breaker.end(None, 40.0, probe=breaker.begin())
    assert told == [True, False]


# Slots


class Crowd:
    """Tasks that hold a slot until told, and how many do."""

    def __init__(self, limit):
        self.slots, self.inside, self.most = Slots(limit), 0, 0
        self.leave = asyncio.Event()

    async def come(self):
        async with self.slots:
            self.inside += 1
            self.most = max(self.most, self.inside)
            try:
                await self.leave.wait()
            finally:
                self.inside -= 1


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


async def test_no_more_come_in_than_the_limit_allows_at_that_moment():
    limit = AdaptiveLimit(8)
    crowd = Crowd(limit)
    tasks = [asyncio.create_task(crowd.come()) for _ in range(5)]
    await settle()
    limit.value = 2  # five are inside, and three slots are free
    tasks += [asyncio.create_task(crowd.come()) for _ in range(20)]
    await settle()
    assert crowd.inside == 5
    for task in tasks[:4]:
        task.cancel()
    await settle()
    assert crowd.inside == 2
    limit.value = 6
    tasks[4].cancel()
    await settle()
    assert crowd.inside == 6
    crowd.leave.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert crowd.inside == 0


@pytest.mark.parametrize("seed", range(20))
async def test_a_slot_is_never_lost_whoever_gives_up(seed):
    rng = random.Random(seed)
    limit = AdaptiveLimit(4)
    slots = Slots(limit)
    done = 0

    async def work():
        nonlocal done
        async with slots:
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
            limit.value = rng.randrange(1, 5)
        done += 1

    tasks = [asyncio.create_task(work()) for _ in range(60)]
    for task in rng.sample(tasks, 25):
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), PATIENCE_S)
    assert done >= 35
    limit.value = 4
    crowd = Crowd(limit)
    crowd.slots = slots
    more = [asyncio.create_task(crowd.come()) for _ in range(10)]
    await settle()
    assert 1 <= crowd.inside <= 4
    crowd.leave.set()
    await asyncio.gather(*more)
    assert crowd.most <= 4
