"""The registry of models over HTTP."""

from __future__ import annotations

import httpx
import pytest

from asap_gateway.auth import Authentication
from asap_runtime.keys import KeyRing
from job_store import a_model


@pytest.fixture
def registry(client):
    return client.trainer.registry


def job(number):
    return f"{number:032x}"


def made(registry, *names, tenant="local"):
    for number, name in enumerate(names):
        a_model(registry, name, f"{tenant[:1].encode().hex()}{number:030x}", tenant)


async def test_a_version_is_shown_without_its_place_in_the_store(client, registry):
    a_model(registry, "coder", job(7), "local")
    body = (await client.get("/models/coder/1")).json()
    created_at = body.pop("created_at")
    assert body == {
        "name": "coder",
        "version": 1,
        "stage": "none",
        "base": "demo",
        "job_id": job(7),
        "manifest_sha256": "0" * 64,
        "meta": {"held_out_loss_after": 0.5},
    }
    assert 1.7e9 < created_at < 1e10


async def test_pages_hold_every_version_once(client, registry):
    made(registry, "x", "x", "y", "x")
    seen, cursor = [], None
    while True:
        params = {"limit": 2} | ({"cursor": cursor} if cursor else {})
        page = (await client.get("/models", params=params)).json()
        seen += [f"{model['name']}@{model['version']}" for model in page["models"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == ["x@3", "x@2", "x@1", "y@1"]
    named = (await client.get("/models", params={"name": "y"})).json()
    assert [model["name"] for model in named["models"]] == ["y"]
    for params in ({"cursor": "x"}, {"limit": 0}, {"limit": 501}, {"name": "X"}):
        assert (await client.get("/models", params=params)).status_code == 422, params


async def test_a_promotion_takes_the_place_of_the_former_one(client, registry):
    made(registry, "x", "x")
    for version in (2, 1):
        answer = await client.post(f"/models/x/{version}/stage", json={"stage": "production"})
        assert (answer.status_code, answer.json()["stage"]) == (200, "production")
        assert (await client.get("/models/x")).json()["version"] == version
    assert (await client.get("/models/x/2")).json()["stage"] == "none"
    wrong = await client.post("/models/x/1/stage", json={"stage": "live"})
    assert (wrong.status_code, wrong.json()["errors"][0]["pointer"]) == (422, "/stage")


async def test_a_version_goes_with_its_files_unless_it_is_in_production(client, registry):
    made(registry, "x", "x")
    keys = [f"{registry.get('local', 'x', version).prefix}/weights" for version in (1, 2)]
    for key in keys:
        with client.blobs.create(key) as writer:
            writer.write(b"x")
    await client.post("/models/x/1/stage", json={"stage": "production"})
    refused = await client.delete("/models/x/1")
    assert (refused.status_code, refused.json()["code"]) == (409, "model-in-production")
    assert (await client.delete("/models/x/2")).status_code == 204
    assert client.blobs.keys_below("local") == keys[:1]
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/stage")):
        body = {"stage": "none"} if method == "POST" else None
        answer = await client.request(method, f"/models/x/2{path}", json=body)
        assert (answer.status_code, answer.json()["code"]) == (404, "not-found"), path


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/models/X", 422),
        ("/models/-x", 422),
        ("/models/x/0", 422),
        ("/models/x/one", 422),
        (f"/models/x/{2**31}", 422),
        ("/models/x/2147483647", 404),
        ("/models/unknown", 404),
    ],
)
async def test_strange_names_and_numbers_are_refused(client, path, status):
    assert (await client.get(path)).status_code == status


async def test_another_tenants_models_do_not_exist(client, registry):
    made(registry, "x", tenant="a")
    ring = KeyRing(client.trainer.registry._database, b"pepper of the tests")
    mine, other = (ring.create(tenant, "k", "submit")[1] for tenant in ("a", "b"))
    transport = httpx.ASGITransport(app=Authentication(client.app, ring))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:

        async def ask(method, path, token, **options):
            headers = {"Authorization": f"Bearer {token}"}
            return await http.request(method, path, headers=headers, **options)

        for method, path, body in (
            ("GET", "/models/x", None),
            ("GET", "/models/x/1", None),
            ("POST", "/models/x/1/stage", {"stage": "production"}),
            ("DELETE", "/models/x/1", None),
        ):
            answer = await ask(method, path, other, json=body)
            assert (answer.status_code, answer.json()["code"]) == (404, "not-found"), path
        assert (await ask("GET", "/models", other)).json() == {"models": [], "next_cursor": None}
        assert (await ask("GET", "/models/x/1", mine)).json()["stage"] == "none"
        train = {"kind": "train", "base": "x@1", "model": "y", "job": "0" * 32}
        answer = await ask("POST", "/jobs", other, json=train)
        assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/base")
