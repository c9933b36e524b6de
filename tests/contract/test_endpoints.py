"""Where models are served: leases, draining, tenants."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from asap.errors import InvalidInput
from asap_runtime.endpoints import EndpointRegistry

A, B = "http://vllm-0:8000", "http://vllm-1:8000"


@pytest.fixture
def registry(database):
    registry = EndpointRegistry(database)
    # What a test says of no lease is about no time.
    registry.announce = partial(registry.announce, lease_s=600.0)
    return registry


def test_what_is_announced_is_live(registry):
    registry.announce("t", "m", A, version=2, baseline_tokens=900.5)
    [found] = registry.live()
    assert (found.tenant, found.model, found.version, found.url) == ("t", "m", 2, A)
    assert (found.draining, found.baseline_tokens) == (False, 900.5)


def test_a_lease_that_is_not_renewed_ends(registry):
    registry.announce("t", "m", A, lease_s=-1)
    registry.announce("t", "m", B)
    assert [one.url for one in registry.live()] == [B]


def test_the_heartbeat_renews_and_keeps_draining(registry):
    registry.announce("t", "m", A, lease_s=-1)
    registry.drain("t", "m", A)
    registry.announce("t", "m", A, version=3)
    [found] = registry.live()
    assert (found.draining, found.version) == (True, 3)


def test_withdrawn_is_gone_and_may_be_withdrawn_again(registry):
    for url in (A, B):
        registry.announce("t", "m", url)
    for _ in range(2):
        registry.withdraw("t", "m", A)
    assert [one.url for one in registry.live()] == [B]


def test_tenants_models_and_urls_do_not_touch_each_other(registry):
    for tenant in ("one", "two"):
        for model in ("m", "n"):
            registry.announce(tenant, model, A)
    registry.withdraw("one", "m", A)
    registry.drain("two", "n", A)
    assert [(one.tenant, one.model, one.draining) for one in registry.live()] == [
        ("one", "n", False),
        ("two", "m", False),
        ("two", "n", True),
    ]


def test_first_announcements_at_once_are_one_row(registry):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: registry.announce("t", "m", A), range(8)))
    assert len(registry.live()) == 1


@pytest.mark.parametrize(
    "url",
    ["vllm:8000", "ftp://vllm", "http://", "http://h:0", "http://h:99999", "http://h/v1",
     "http://a:b@h", "http://h?x", "http://[::1"],
)  # fmt: skip
def test_an_address_that_is_none_is_refused(registry, url):
    with pytest.raises(InvalidInput):
        registry.announce("t", "m", url)
    assert registry.live() == []
