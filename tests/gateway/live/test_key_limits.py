from __future__ import annotations

from contextlib import ExitStack

import pytest

from asap.errors import Overloaded
from asap_gateway.auth import LOCAL, Principal
from asap_gateway.live import key_limits
from asap_gateway.live.key_limits import KeyLimits

ONE, OTHER = Principal("t", "one", "submit"), Principal("t", "other", "submit")


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def limits(clock):
    return KeyLimits(streams=2, tokens_per_minute=600, clock=clock)


def refusal(limits, caller):
    with pytest.raises(Overloaded) as caught, limits.admitted(caller):
        pass
    assert caught.value.problem_code == "rate-limited"
    return caught.value


def test_streams_of_a_key_are_bounded_and_given_back(limits):
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(limits.admitted(ONE))
        refusal(limits, ONE)
        with limits.admitted(OTHER):
            pass
    with limits.admitted(ONE):
        pass


def test_a_request_that_fails_gives_its_place_back(limits):
    for _ in range(5):
        with pytest.raises(ZeroDivisionError), limits.admitted(ONE):
            raise ZeroDivisionError


def test_a_long_answer_is_paid_off_before_the_next(limits, clock):
    with limits.admitted(ONE):
        limits.spend(ONE, 900)
    wait_s = refusal(limits, ONE).context["retry_after_s"]
    assert wait_s == pytest.approx(30.1)
    with limits.admitted(OTHER):
        pass
    clock.now += wait_s
    with limits.admitted(ONE):
        pass


def test_nobody_saves_up_more_than_a_minute(limits, clock):
    clock.now += 3600
    with limits.admitted(ONE):
        limits.spend(ONE, 601)
    refusal(limits, ONE)


def test_without_keys_nobody_is_limited(limits):
    with ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(limits.admitted(LOCAL))
            limits.spend(LOCAL, 10_000)


def test_accounts_are_bounded_and_debts_stay(limits, clock, monkeypatch):
    monkeypatch.setattr(key_limits, "MAX_KEYS", 3)
    for number in range(50):
        clock.now += 10
        limits.spend(ONE, 200)
        with limits.admitted(Principal("t", f"key {number}", "submit")):
            pass
    assert len(limits._accounts) < 12
    refusal(limits, ONE)
