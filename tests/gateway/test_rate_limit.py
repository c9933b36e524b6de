from __future__ import annotations

from collections import Counter

import httpx
import pytest
from starlette.responses import JSONResponse

from asap_gateway import rate_limit
from asap_gateway.auth import Principal
from asap_gateway.rate_limit import RateLimit


class Limited:
    """A limited application, its clock, and callers by name."""

    def __init__(self):
        self.now, self.served = 0.0, Counter()
        self.limit = RateLimit(self._serve, rate_per_s=2, burst=4, clock=lambda: self.now)

    async def _serve(self, scope, receive, send):
        self.served[scope["path"]] += 1
        await JSONResponse({})(scope, receive, send)

    async def ask(self, caller="key", path="/jobs"):
        async def identified(scope, receive, send):
            if caller is not None:
                scope["state"] = {"principal": Principal("a", caller, "submit")}
            await self.limit(scope, receive, send)

        transport = httpx.ASGITransport(app=identified)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.get(path)

    async def statuses(self, count, caller="key"):
        return [(await self.ask(caller)).status_code for _ in range(count)]


@pytest.fixture
def limited():
    return Limited()


async def test_a_burst_passes_and_then_the_rate_holds(limited):
    assert await limited.statuses(6) == [200] * 4 + [429] * 2
    assert limited.served["/jobs"] == 4
    limited.now += 0.49
    assert await limited.statuses(1) == [429]
    limited.now += 0.02
    assert await limited.statuses(2) == [200, 429]
    limited.now += 1000
    assert await limited.statuses(6) == [200] * 4 + [429] * 2


async def test_over_a_long_time_no_more_than_the_rate_passes(limited):
    passed = 0
    for _ in range(1000):
        limited.now += 0.1
        passed += (await limited.statuses(1)).count(200)
    assert 4 + 2 * 100 - 1 <= passed <= 4 + 2 * 100


async def test_a_refusal_says_when_to_come_back(limited):
    await limited.statuses(4)
    answer = await limited.ask()
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert (body["code"], body["status"], body["retry_after_s"]) == ("rate-limited", 429, 0.5)
    assert answer.headers["Retry-After"] == "1"
    limited.now += body["retry_after_s"]
    assert await limited.statuses(1) == [200]


async def test_every_answer_tells_what_is_left(limited):
    def told(answer):
        names = ("RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset")
        return tuple(answer.headers[name] for name in names)

    seen = [told(await limited.ask()) for _ in range(5)]
    assert seen == [("4", left, back) for left, back in zip("32100", "11222", strict=True)]


async def test_keys_do_not_share_a_bucket(limited):
    await limited.statuses(5, "one")
    assert await limited.statuses(2, "other") == [200, 200]
    assert await limited.statuses(1, "one") == [429]


async def test_nobody_without_a_key_is_limited(limited):
    """That is: the probes, and everybody on a server without keys."""
    answers = [await limited.ask(None, path="/healthz") for _ in range(20)]
    assert {answer.status_code for answer in answers} == {200}
    assert "RateLimit-Limit" not in answers[0].headers


async def test_the_buckets_are_bounded_and_the_busy_ones_stay(limited, monkeypatch):
    monkeypatch.setattr(rate_limit, "MAX_BUCKETS", 3)
    await limited.statuses(5, "busy")
    for number in range(50):
        await limited.ask(f"key {number}")
        assert await limited.statuses(1, "busy") == [429]
    assert len(limited.limit._buckets) == 3
