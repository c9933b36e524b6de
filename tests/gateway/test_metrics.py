from __future__ import annotations

import httpx
import pytest
from prometheus_client import REGISTRY
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route

from asap_gateway.metrics import HttpMetrics


def count(route, status):
    labels = {"route": route, "status": str(status)}
    return REGISTRY.get_sample_value("asap_http_seconds_count", labels) or 0


def through(app):
    transport = httpx.ASGITransport(HttpMetrics(app), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


@pytest.mark.parametrize(
    ("method", "path", "route", "status"),
    [
        ("GET", "/healthz", "/healthz", 200),
        ("GET", "/jobs/planted-1", "/jobs/{job_id}", 404),
        ("GET", "/jobs/planted-2/items", "/jobs/{job_id}/items", 404),
        ("POST", "/prune", "/prune", 422),
        ("PUT", "/jobs", "/jobs", 405),
        ("GET", "/planted-3", "unknown", 404),
    ],
)
async def test_an_answer_counts_for_its_route_and_status(client, method, path, route, status):
    before = count(route, status)
    answer = await client.request(method, path)
    assert answer.status_code == status
    assert count(route, status) == before + 1


async def test_callers_make_no_labels(client):
    for i in range(20):
        await client.get(f"/planted-{i}")
        await client.get(f"/jobs/planted-{i}")
    text = (await client.get("/metrics")).text
    assert "asap_http_seconds_bucket" in text
    assert "planted" not in text


async def test_a_stream_is_measured_when_it_begins_and_a_crash_is_500():
    seen_at_start, streams, crashes = [], count("/stream", 200), count("/crash", 500)

    async def stream(request):
        async def parts():
            seen_at_start.append(count("/stream", 200) - streams)
            yield b"x"

        return StreamingResponse(parts())

    async def crash(request):
        raise ValueError("planted")

    async with through(
        Starlette(routes=[Route("/stream", stream), Route("/crash", crash)])
    ) as http:
        assert (await http.get("/stream")).content == b"x"
        assert (await http.get("/crash")).status_code == 500
    assert seen_at_start == [1]
    assert count("/stream", 200) - streams == 1
    assert count("/crash", 500) - crashes == 1


async def test_other_scopes_pass():
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["type"])

    await HttpMetrics(app)({"type": "lifespan"}, None, None)
    assert seen == ["lifespan"]
