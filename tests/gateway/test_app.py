from __future__ import annotations

import pytest


async def test_health_readiness_and_metrics(client):
    assert (await client.get("/healthz")).json() == {"status": "ok"}
    assert (await client.get("/readyz")).json() == {"status": "ok", "broker": "ok"}
    text = (await client.get("/metrics")).text
    for name in ("asap_items_total", "asap_stage_seconds", "asap_queue_items", "asap_stale_writes"):
        assert name in text


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not-found"),
        ("PUT", "/jobs", 405, "method-not-allowed"),
        ("GET", "/jobs/%00", 404, "not-found"),
        ("GET", "/jobs/../../etc/passwd", 404, "not-found"),
        ("GET", "/jobs?limit=0", 422, "invalid-input"),
        ("GET", "/jobs?cursor=x", 422, "invalid-input"),
        ("GET", "/jobs?cursor=99999999999999999999999.x", 422, "invalid-input"),
    ],
)
async def test_every_error_is_a_problem(client, method, path, status, code):
    answer = await client.request(method, path)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["instance"].startswith("/")


async def test_the_description_names_every_route_and_problem(client):
    description = (await client.get("/openapi.json")).json()
    assert {"/prune", "/jobs", "/jobs/upload", "/jobs/{job_id}/events"} <= set(description["paths"])
    for path in ("/prune", "/jobs"):
        assert {"413", "422", "429"} <= set(description["paths"][path]["post"]["responses"])
