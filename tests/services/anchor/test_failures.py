"""Reading Retry-After, and which statuses are worth a retry."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asap.errors import UpstreamError, UpstreamUnavailable
from asap_anchor.failures import Failures, Transient, concerns, retry_after_s
from asap_anchor.wire import Refusal

NOW = 1_445_412_480.0  # Wed, 21 Oct 2015 07:28:00 GMT
FAILURES = Failures(server="host:8000", model="tiny", retries=6)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "250", "retry-after": "7"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "7"}, 7.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:30 GMT"}, 30.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:00:00 GMT"}, 0.0),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "Wed, 99 Oct 99999 07:28:30 GMT"}, None),
    ],
    ids=str,
)
def test_reads_how_long_the_server_asks_to_wait(headers, seconds):
    assert retry_after_s(headers, now=NOW) == seconds


@given(st.text(max_size=40))
def test_no_header_is_too_odd_to_read(value):
    seconds = retry_after_s({"retry-after": value, "retry-after-ms": value}, now=NOW)

    assert seconds is None or seconds >= 0


@pytest.mark.parametrize("status", [s for s in range(400, 600) if s != 402])
def test_only_408_409_429_and_5xx_are_transient(status):
    failure = FAILURES.refused(status, {})

    assert isinstance(failure, Transient) == (status in (408, 409, 429) or status >= 500)


def test_the_wait_is_in_the_context_only_when_known():
    known = FAILURES.refused(503, {"retry-after": "3"})
    unknown = FAILURES.refused(503, {})

    assert known.error.context == {
        "server": "host:8000", "status": 503, "retry_after_s": 3.0, "waits": True
    }  # fmt: skip

    assert unknown.error.context == {"server": "host:8000", "status": 503, "waits": True}


@pytest.mark.parametrize(
    ("failure", "whose"),
    [
        (FAILURES.refused(400, {}), "call"),
        (FAILURES.refused(422, {}), "call"),
        (FAILURES.refused(429, {}), "call"),
        (FAILURES.refused(401, {}), "server"),
        (FAILURES.refused(404, {}), "server"),
        (FAILURES.refused(408, {}), "server"),
        (FAILURES.refused(503, {}), "server"),
        (FAILURES.timed_out(1), "server"),
        (FAILURES.unreachable(), "server"),
        (FAILURES.malformed(), "server"),
        (FAILURES.refused(402, {}), "account"),
        (FAILURES.refused(429, {}, Refusal("insufficient_quota")), "account"),
    ],
    ids=str,
)
def test_a_failure_concerns_a_call_the_server_or_the_account(failure, whose):
    error = failure.error if isinstance(failure, Transient) else failure
    assert concerns(error) == whose


def test_each_sentence_names_the_server_and_ends():
    made = [FAILURES.timed_out(600), FAILURES.unreachable(), FAILURES.malformed()]
    errors = [failure.error for failure in [*made, FAILURES.refused(429, {})]]

    for error in [*errors, FAILURES.refused(404, {})]:
        assert isinstance(error, UpstreamError)
        assert "host:8000" in error.detail
        assert error.detail.endswith(".")
    assert isinstance(errors[-1], UpstreamUnavailable)
