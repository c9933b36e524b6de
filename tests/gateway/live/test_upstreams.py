from __future__ import annotations

import asyncio

import aiohttp
import pytest

from asap.errors import NotFound, Overloaded, UpstreamUnavailable
from asap_gateway.live.settings import ServingSettings
from asap_gateway.live.upstreams import FAILURES, OPEN_S, Upstreams
from asap_runtime.endpoints import Endpoint
from fake_vllm import FakeVllm
from waiting import PATIENCE_S, until


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """A server that is slow because the machine is busy is well."""
    monkeypatch.setattr("asap_gateway.live.upstreams.HEALTH_TIMEOUT_S", PATIENCE_S)


class Table:
    """What deployments have announced."""

    def __init__(self, *rows):
        self.rows = list(rows)

    def live(self):
        return self.rows


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def endpoint(tenant, model, url, version=None, *, draining=False):
    return Endpoint(tenant, model, version, url, draining, 900.0)


async def refreshed(upstreams):
    async with aiohttp.ClientSession() as session:
        await upstreams.refresh(session)


def static(*urls, **settings):
    clock = Clock()
    upstreams = Upstreams(ServingSettings(endpoints={"m": urls}, **settings), clock=clock)
    return upstreams.find("any", "m"), clock


def test_the_one_with_the_fewest_requests_is_next():
    route, _ = static("http://a:1", "http://b:1", "http://c:1")
    a, b, c = route.backends
    a.outstanding, b.outstanding, c.outstanding = 3, 1, 2
    assert route.pick([]) is b
    assert route.pick([b]) is c
    assert route.pick([b], prefer=a) is a
    with pytest.raises(UpstreamUnavailable):
        route.pick([a, b, c])


def test_full_servers_are_not_asked():
    route, _ = static("http://a:1", "http://b:1", requests_per_endpoint=2)
    a, b = route.backends
    a.outstanding, b.outstanding = 2, 1
    assert route.pick([]) is b
    b.outstanding = 2
    with pytest.raises(Overloaded) as caught:
        route.pick([])
    assert caught.value.context["retry_after_s"]


def test_one_that_fails_again_and_again_is_left_alone_and_tried_again_once():
    route, clock = static("http://a:1")
    [a] = route.backends
    for _ in range(FAILURES):
        assert route.pick([]) is a
        a.failed(clock.now)
    with pytest.raises(UpstreamUnavailable):
        route.pick([])
    clock.now += OPEN_S
    assert route.pick([]) is a
    with pytest.raises(UpstreamUnavailable):
        route.pick([])  # the one try is under way
    a.succeeded()
    assert route.pick([]) is a


async def test_a_server_that_is_not_well_gets_nothing_until_it_is():
    with FakeVllm() as one, FakeVllm() as other:
        upstreams = Upstreams(ServingSettings(endpoints={"m": (one.url, other.url)}))
        one.healthy = False
        await refreshed(upstreams)
        route = upstreams.find("any", "m")
        assert {route.pick([]).url for _ in range(3)} == {other.url}
        one.healthy, other.healthy = True, False
        await refreshed(upstreams)
        assert route.pick([]).url == one.url


async def test_a_server_that_is_gone_is_not_well():
    with FakeVllm() as server:
        url = server.url
    upstreams = Upstreams(ServingSettings(endpoints={"m": (url,)}))
    await refreshed(upstreams)
    with pytest.raises(UpstreamUnavailable):
        upstreams.find("any", "m").pick([])


async def test_names_and_context_are_the_servers_own():
    with FakeVllm(model="/models/7b", context=2048) as server:
        upstreams = Upstreams(ServingSettings(endpoints={"m": (server.url,)}))
        assert upstreams.find("any", "m").context is None
        await refreshed(upstreams)
        route = upstreams.find("any", "m")
        assert route.name_at(route.backends[0]) == "/models/7b"
        assert route.context == 2048


async def test_an_announced_model_is_its_tenants_alone():
    with FakeVllm() as server:
        table = Table(endpoint("one", "m", server.url, 3))
        upstreams = Upstreams(ServingSettings(endpoints={"all": (server.url,)}), table)
        await refreshed(upstreams)
        assert upstreams.models("one") == ["all", "m", "m@3"]
        assert upstreams.models("two") == ["all"]
        assert upstreams.find("one", "m@3").version == 3
        assert upstreams.find("one", "m").baseline_tokens == 900.0
        with pytest.raises(NotFound):
            upstreams.find("two", "m")


async def test_versions_of_one_name_are_told_apart():
    with FakeVllm() as old, FakeVllm() as new:
        table = Table(endpoint("t", "m", old.url, 1), endpoint("t", "m", new.url, 2))
        upstreams = Upstreams(ServingSettings(), table)
        await refreshed(upstreams)
        assert [one.url for one in upstreams.find("t", "m@2").backends] == [new.url]
        assert {one.url for one in upstreams.find("t", "m").backends} == {old.url, new.url}


async def test_a_draining_or_vanished_server_gets_nothing_new():
    with FakeVllm() as server:
        table = Table(endpoint("t", "m", server.url))
        upstreams = Upstreams(ServingSettings(), table)
        await refreshed(upstreams)
        assert upstreams.find("t", "m").pick([])
        table.rows = [endpoint("t", "m", server.url, draining=True)]
        await refreshed(upstreams)
        with pytest.raises(NotFound):
            upstreams.find("t", "m")
        table.rows = []
        await refreshed(upstreams)
        assert upstreams.models("t") == []


async def test_a_table_that_cannot_be_read_changes_nothing():
    with FakeVllm() as server:
        table = Table(endpoint("t", "m", server.url))
        upstreams = Upstreams(ServingSettings(), table)
        await refreshed(upstreams)

        def gone():
            raise UpstreamUnavailable("gone", code="database-unavailable")

        table.live = gone
        await refreshed(upstreams)
        assert upstreams.find("t", "m").pick([]).url == server.url


async def test_watching_goes_on_by_itself():
    with FakeVllm() as server:
        table = Table()
        upstreams = Upstreams(ServingSettings(health_period_s=0.01), table)
        async with aiohttp.ClientSession() as session:
            watching = asyncio.create_task(upstreams.watch(session))
            table.rows = [endpoint("t", "m", server.url)]
            await until(lambda: upstreams.models("t") == ["m"])
            watching.cancel()
