from __future__ import annotations

import asyncio

import pytest
from prometheus_client import REGISTRY

from asap_gateway.live.calls import Caller, open_session
from asap_gateway.live.requests import read_request
from asap_gateway.live.settings import ServingSettings
from asap_gateway.live.shadow import Shadow
from asap_gateway.live.upstreams import Upstreams
from asap_gateway.live.usage import Tally
from fake_vllm import FakeVllm, Say, Status
from waiting import PATIENCE_S, until

ASKED = read_request(
    "chat/completions",
    {"model": "small", "messages": [{"role": "user", "content": "q"}], "stream": True, "seed": 1,
     "thinking": {"budget_tokens": 5}},
)  # fmt: skip
DONE = Tally(prompt=3, completion=4)


class Shadowed:
    """A shadow with one baseline, and what the metrics say of it since it began."""

    def __init__(self, shadow, upstreams):
        self.shadow, self.upstreams = shadow, upstreams
        self._before = {name: self._value(name) for name in ("compared", "failed", "dropped")}
        self._saved = self._sample("asap_shadow_tokens_saved", model="small")

    def follow(self, tally=DONE):
        self.shadow.follow("t", ASKED, tally, 0.0)

    async def settled(self):
        while self.shadow._tasks:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    def count(self, outcome):
        return self._value(outcome) - self._before[outcome]

    @property
    def saved(self):
        return self._sample("asap_shadow_tokens_saved", model="small") - self._saved

    def _value(self, outcome):
        return self._sample("asap_shadow_requests_total", model="small", outcome=outcome)

    @staticmethod
    def _sample(name, **labels):
        return REGISTRY.get_sample_value(name, labels) or 0.0


@pytest.fixture
def server():
    with FakeVllm(model="big", script=[Say(*"abcdefghij")]) as server:
        yield server


@pytest.fixture
async def shadowed(server):
    settings = ServingSettings(
        endpoints={"big": (server.url,)},
        shadow={"small": {"baseline": "big", "share": 0.5}},
        shadow_concurrency=2,
        requests_per_endpoint=10,
        connect_s=PATIENCE_S,
    )
    upstreams = Upstreams(settings)
    draws = iter([0.4, 0.6] * 50)
    async with open_session(settings) as session:
        shadow = Shadow(settings, upstreams, Caller(session, settings), draw=lambda: next(draws))
        yield Shadowed(shadow, upstreams)
        await shadow.stop()


async def test_a_share_of_the_requests_is_compared(shadowed, server):
    for _ in range(6):
        shadowed.follow()
        await shadowed.settled()
    assert len(server.requests) == 3
    assert shadowed.count("compared") == 3
    assert shadowed.saved == 3 * (10 - 4)


async def test_the_baseline_is_asked_the_same_but_not_as_a_stream(shadowed, server):
    shadowed.follow()
    await shadowed.settled()
    [request] = server.requests
    assert request.body == {"model": "big", "messages": ASKED.body["messages"], "seed": 1}


async def test_no_more_than_so_many_at_once(shadowed, server):
    server.script = [Say("late", waits_after=0)]
    for _ in range(10):
        shadowed.follow()
    await until(lambda: server.concurrent == 2)
    server.go.set()
    await shadowed.settled()
    assert server.max_concurrent == 2
    assert (shadowed.count("compared"), shadowed.count("dropped")) == (2, 3)


async def test_live_requests_go_first(shadowed, server):
    [backend] = shadowed.upstreams.find("t", "big").backends
    backend.outstanding = 5
    shadowed.follow()
    await shadowed.settled()
    assert server.requests == []
    assert shadowed.count("dropped") == 1


async def test_a_baseline_that_fails_is_counted_and_no_more(shadowed, server):
    server.script = [Status(500)]
    shadowed.follow()
    await shadowed.settled()
    assert shadowed.count("failed") == 1
    assert shadowed.saved == 0


async def test_an_answer_without_a_count_is_not_compared(shadowed, server):
    shadowed.follow(Tally())
    await shadowed.settled()
    assert server.requests == []
