from __future__ import annotations

import pytest

from asap_runtime.drain_rate import DrainRate


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def rate(clock):
    return DrainRate(clock)


def see(rate, clock, *backlogs, every_s=1.0):
    for backlog in backlogs:
        rate.observe(backlog)
        clock.now += every_s


def test_a_shrinking_backlog_says_when_to_come_again(rate, clock):
    see(rate, clock, 1000, 900, 800, 700)
    assert rate.items_per_s() == 100
    assert all(7 <= rate.retry_after_s(700) <= 7 * 1.25 for _ in range(50))


def test_refused_callers_do_not_come_again_together(rate, clock):
    see(rate, clock, 1000, 900)
    assert len({rate.retry_after_s(900) for _ in range(20)}) > 10


def test_new_jobs_do_not_hide_what_leaves(rate, clock):
    see(rate, clock, 1000, 900, 5900, 5800, 5700)
    assert rate.items_per_s() == 75  # 300 items in 4 s, one of which was a job's arrival


@pytest.mark.parametrize("backlogs", [(), (10,), (10, 10, 20)])
def test_without_anything_that_left_the_advice_is_half_a_minute(rate, clock, backlogs):
    see(rate, clock, *backlogs)
    assert rate.items_per_s() == 0
    assert 30 <= rate.retry_after_s(10**6) <= 37.5


@pytest.mark.parametrize(("excess", "seconds"), [(0, 1), (1, 1), (10**9, 300)])
def test_the_advice_is_from_a_second_to_five_minutes(rate, clock, excess, seconds):
    see(rate, clock, 1000, 900)
    assert rate.retry_after_s(excess) == seconds


def test_only_the_last_minute_counts(rate, clock):
    see(rate, clock, 10_000, 0)
    clock.now += 120
    see(rate, clock, 100, 90, 80)
    assert rate.items_per_s() == 10


def test_two_looks_at_one_moment_are_no_rate(rate):
    rate.observe(10)
    rate.observe(5)
    assert rate.items_per_s() == 0
