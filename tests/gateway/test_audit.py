from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from asap_gateway.app import create_app
from asap_gateway.auth import Authentication
from asap_gateway.service import Gateway
from asap_gateway.settings import GatewayLimits
from asap_runtime.blobs import BlobStore
from asap_runtime.host import open_database
from asap_runtime.keys import KeyRing
from asap_runtime.logs import configure_logs
from asap_runtime.queue import MemoryQueue
from asap_runtime.settings import RuntimeSettings, TelemetrySettings

TRIPLE = {"question": "q", "cot": "first step\n\nsecond", "answer": "a step"}
CONFIG = {"config": {"anchor": "extractive"}}
JOB = {"triples": [TRIPLE], **CONFIG}


@pytest.fixture
def database(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    database = open_database(RuntimeSettings(home=tmp_path / "home"))
    yield database
    database.close()


@pytest.fixture
def app(database):
    gateway = Gateway(database, MemoryQueue(), GatewayLimits(), BlobStore.in_folder(Path("blobs")))
    return create_app(gateway)


@pytest.fixture
def trail(app):
    return app.state.gateway.audit


def client(app, **options):
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test", **options)


def acts(trail, tenant="local"):
    entries = reversed(trail.entries(tenant))
    return [(entry.actor, entry.action, entry.object, entry.result) for entry in entries]


async def test_every_change_is_recorded_and_no_reading(app, trail):
    async with client(app) as http:
        job = (await http.post("/jobs", json=JOB)).json()["id"]
        for path in ("/jobs", f"/jobs/{job}", f"/jobs/{job}/items", "/healthz", "/openapi.json"):
            assert (await http.get(path)).status_code == 200
        await http.post(f"/jobs/{job}/cancel")
        await http.post(f"/jobs/{job}/retry")
        await http.delete(f"/jobs/{job}")
        await http.delete(f"/jobs/{job}")
        lines = json.dumps(TRIPLE).encode()
        upload = await http.post("/jobs/upload", files={"file": ("x.jsonl", lines)})
        waiting = await http.post("/prune", json={"triple": TRIPLE, "wait_s": 0.01, **CONFIG})
        await http.post("/jobs", json={"triples": []})
    assert (upload.status_code, waiting.status_code) == (202, 202)
    assert acts(trail) == [
        ("local", "POST /jobs", job, "202"),
        ("local", "POST /jobs/{job_id}/cancel", job, "200"),
        ("local", "POST /jobs/{job_id}/retry", job, "200"),
        ("local", "DELETE /jobs/{job_id}", job, "204"),
        ("local", "DELETE /jobs/{job_id}", job, "404"),
        ("local", "POST /jobs/upload", upload.json()["id"], "202"),
        ("local", "POST /prune", waiting.json()["id"], "202"),
        ("local", "POST /jobs", "-", "422"),
    ]


async def test_no_changing_route_is_forgotten(app, trail):
    changing = {
        (method.upper(), path)
        for path, operations in app.openapi()["paths"].items()
        for method in operations
        if method != "get" and not path.startswith("/v1/")  # those leave nothing behind
    }
    assert len(changing) >= 6
    async with client(app) as http:
        for method, path in changing:
            await http.request(method, path.format(job_id="unknown", name="m", version=1))
    assert {action for _, action, _, _ in acts(trail)} == {f"{m} {p}" for m, p in changing}


async def test_the_actor_is_the_key_in_its_tenant(app, trail, database):
    ring = KeyRing(database, b"pepper of the tests")
    key, token = ring.create("b", "laptop", "submit")
    headers = {"Authorization": f"Bearer {token}", "X-Request-ID": "r-1"}
    async with client(Authentication(app, ring), headers=headers) as http:
        job = (await http.post("/jobs", json=JOB)).json()["id"]
    assert acts(trail, "b") == [(key.id, "POST /jobs", job, "202")]
    assert trail.entries("b")[0].request_id == "r-1"
    assert acts(trail) == []


async def test_what_was_refused_at_the_door_or_has_no_route_is_left_out(app, trail, database):
    ring = KeyRing(database, b"pepper of the tests")
    _, token = ring.create("b", "reader", "read")
    async with client(Authentication(app, ring)) as http:
        assert (await http.post("/jobs", json=JOB)).status_code == 401
        http.headers["X-API-Key"] = token
        assert (await http.post("/jobs", json=JOB)).status_code == 403
    async with client(app) as http:
        assert (await http.post("/nowhere")).status_code == 404
    assert acts(trail) == acts(trail, "b") == []


async def test_a_repeated_request_is_one_act(app, trail):
    async with client(app, headers={"Idempotency-Key": "k"}) as http:
        first, again = [await http.post("/jobs", json=JOB) for _ in range(2)]
    assert again.headers["Idempotent-Replayed"] == "true"
    assert acts(trail) == [("local", "POST /jobs", first.json()["id"], "202")]


async def test_a_crash_is_recorded_as_500(app, trail):
    @app.post("/crash")
    async def crash():
        raise RuntimeError("secret")

    async with client(app) as http:
        assert (await http.post("/crash")).status_code == 500
    assert acts(trail) == [("local", "POST /crash", "-", "500")]


async def test_the_answer_is_sent_before_the_act_is_recorded_and_does_not_need_it(
    app, trail, database, monkeypatch, capsys
):
    configure_logs(TelemetrySettings(log_json=True))
    sent = []

    def refuse(**act):
        assert sent, "the answer comes first"
        raise RuntimeError("secret")

    async def noting(scope, receive, send):
        async def note(message):
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                sent.append(message)

        await app(scope, receive, note)

    monkeypatch.setattr(trail, "record", refuse)
    async with client(noting) as http:
        assert (await http.post("/jobs", json=JOB)).status_code == 202
    log = capsys.readouterr().err
    assert "audit.failed" in log
    assert "secret" not in log
