from __future__ import annotations

import logging
from pathlib import Path

import httpx
import pytest
from fastapi import Request
from sqlalchemy import update

from asap.errors import UpstreamUnavailable
from asap_gateway.app import create_app
from asap_gateway.auth import LOCAL, Authentication, Principal, get_principal
from asap_gateway.service import Gateway
from asap_gateway.settings import GatewayLimits
from asap_runtime.blobs import BlobStore
from asap_runtime.database import SECOND
from asap_runtime.host import open_database
from asap_runtime.keys import KeyRing
from asap_runtime.logs import configure_logs
from asap_runtime.queue import MemoryQueue
from asap_runtime.settings import RuntimeSettings, TelemetrySettings
from asap_runtime.tables import api_keys

TRIPLE = {"question": "q", "cot": "first step\n\nsecond", "answer": "a step"}
JOB = {"triples": [TRIPLE], "config": {"anchor": "extractive"}}
ROLES = ("read", "submit", "admin")


class Door:
    """The application behind its lock, and the keys to it."""

    def __init__(self, database):
        self.database, self.now = database, 1000.0
        self.ring = KeyRing(database, b"pepper of the tests", clock=lambda: self.now)
        gateway = Gateway(
            database,
            MemoryQueue(),
            GatewayLimits(),
            BlobStore.in_folder(Path("blobs")),
        )
        self.inner = create_app(gateway)
        self.app = Authentication(self.inner, self.ring)

    def key(self, role="submit", tenant="a", **options):
        return self.ring.create(tenant, role, role, **options)

    def token(self, role="submit", tenant="a"):
        return self.key(role, tenant)[1]

    async def ask(self, method, path, token=None, headers=None, **options):
        headers = headers or {}
        if token is not None:
            headers = {"Authorization": f"Bearer {token}"}
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.request(method, path, headers=headers, **options)


@pytest.fixture
def door(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    database = open_database(RuntimeSettings(home=tmp_path / "home"))
    yield Door(database)
    database.close()


def end_expiry(database):
    with database.write() as connection:
        past = api_keys.c.created_at - SECOND
        connection.execute(update(api_keys).values(expires_at=past))


def with_last_changed(token):
    return token[:-1] + ("0" if token[-1] != "0" else "1")


async def test_a_key_opens_in_either_header(door):
    token = door.token("read")
    for headers in (
        {"Authorization": f"Bearer {token}"},
        {"authorization": f"bearer  {token} "},
        {"X-API-Key": token},
        {"Authorization": "Basic dTpw", "X-API-Key": token},  # of a proxy before us
    ):
        assert (await door.ask("GET", "/jobs", headers=headers)).status_code == 200, headers


async def test_every_failure_sounds_the_same(door):
    good, revoked, expired = door.token(), *(door.key(tenant=t) for t in ("b", "c"))
    for token in (revoked[1], expired[1]):
        assert (await door.ask("GET", "/jobs", token)).status_code == 200
    door.ring.revoke(revoked[0].id)
    end_expiry(door.database)
    door.now += 5
    good = door.token(tenant="d")
    secret = good.split("_")[2]
    failures = {
        "no key": {},
        "empty": {"Authorization": "Bearer "},
        "scheme alone": {"Authorization": "Bearer"},
        "another scheme": {"Authorization": f"Basic {good}"},
        "no scheme": {"Authorization": good},
        "wrong secret": {"Authorization": f"Bearer {with_last_changed(good)}"},
        "unknown id": {"Authorization": f"Bearer asap_{'0' * 16}_{secret}"},
        "malformed": {"Authorization": "Bearer asap_nonsense"},
        "two keys": {"Authorization": f"Bearer {good} {good}"},
        "no ASCII": {"Authorization": "Bearer asap_\xe9".encode("latin-1")},
        "long": {"X-API-Key": "asap_" + "0" * 50_000},
        "revoked": {"Authorization": f"Bearer {revoked[1]}"},
        "expired": {"Authorization": f"Bearer {expired[1]}"},
        "bad one goes first": {"Authorization": "Bearer x", "X-API-Key": good},
    }
    answers = {name: await door.ask("GET", "/jobs", headers=h) for name, h in failures.items()}
    assert {name: a.status_code for name, a in answers.items()} == dict.fromkeys(failures, 401)
    assert len({answer.content for answer in answers.values()}) == 1
    answer = answers["no key"]
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert (answer.json()["code"], answer.json()["instance"]) == ("unauthorized", "/jobs")
    assert (await door.ask("GET", f"/jobs?key={good}")).status_code == 401
    assert (await door.ask("GET", "/jobs", good)).status_code == 200


def routes(app):
    for path, operations in app.openapi()["paths"].items():
        for method in operations:
            yield method.upper(), path.format(job_id="0" * 32, name="coder", version=1)
    yield "GET", "/openapi.json"
    yield "POST", "/nowhere"


async def test_no_route_is_open_but_the_probes(door):
    found = list(routes(door.inner))
    assert {("POST", "/prune"), ("DELETE", f"/jobs/{'0' * 32}"), ("GET", "/metrics")} <= {*found}
    opened = {path for m, path in found if (await door.ask(m, path)).status_code != 401}
    assert opened == {"/healthz", "/readyz"}


@pytest.mark.parametrize("role", ROLES)
async def test_each_route_wants_its_role(door, role):
    token = door.token(role)
    wrong = []
    for method, path in routes(door.inner):
        if path in ("/healthz", "/readyz"):
            continue
        needed = "admin" if path == "/metrics" else "read" if method == "GET" else "submit"
        answer = await door.ask(method, path, token)
        refused = answer.status_code == 403
        if refused != (ROLES.index(role) < ROLES.index(needed)) or answer.status_code == 401:
            wrong.append((method, path, answer.status_code))
        if refused:
            body = answer.json()
            assert body.get("error", body)["code"] == "forbidden-role"  # /v1 speaks OpenAI's shape
            assert repr(needed) in answer.text
            assert "WWW-Authenticate" not in answer.headers
    assert wrong == []


async def test_unusual_methods_need_the_role_that_changes(door):
    token = door.token("read")
    for method in ("PUT", "PATCH", "PURGE"):
        assert (await door.ask(method, "/jobs", token)).status_code == 403, method
    for method in ("HEAD", "OPTIONS"):
        assert (await door.ask(method, "/jobs", token)).status_code == 405, method
        assert (await door.ask(method, "/jobs")).status_code == 401, method


async def test_a_tenant_does_not_see_anothers_job(door):
    mine, other = door.token(tenant="a"), door.token(tenant="b")
    job = (await door.ask("POST", "/jobs", mine, json=JOB)).json()["id"]
    assert (await door.ask("GET", f"/jobs/{job}", mine)).status_code == 200
    for method, path in routes(door.inner):
        if "0" * 32 in path:
            answer = await door.ask(method, path.replace("0" * 32, job), other)
            assert answer.status_code == 404, (method, path)
    assert (await door.ask("GET", "/jobs", other)).json()["jobs"] == []
    assert (await door.ask("GET", f"/jobs/{job}", mine)).status_code == 200


async def test_a_revocation_holds_within_5_s_on_another_replica(door):
    key, token = door.key()
    assert (await door.ask("GET", "/jobs", token)).status_code == 200
    KeyRing(door.database, b"").revoke(key.id)
    door.now += 5
    assert (await door.ask("GET", "/jobs", token)).status_code == 401


async def test_no_answer_and_no_log_holds_a_token(door, capsys, caplog):
    configure_logs(TelemetrySettings(log_level="debug", log_json=True))
    caplog.set_level(logging.DEBUG)
    tokens = [door.token("read"), door.token("admin")]
    tokens.append(with_last_changed(tokens[1]))
    answers = [
        await door.ask(method, path, token)
        for token in tokens
        for method, path in (("GET", "/jobs"), ("POST", "/jobs"), ("GET", "/metrics"))
    ]
    assert {answer.status_code for answer in answers} == {200, 401, 403, 422}
    out, err = capsys.readouterr()
    said = out + err + caplog.text + "".join(a.text + str(a.headers) for a in answers)
    for token in tokens:
        assert token.split("_")[2][:-1] not in said


async def test_a_database_that_is_away_is_no_wrong_key(door, monkeypatch):
    token = door.token()

    def refuse():
        raise UpstreamUnavailable("the database does not answer", code="database-unavailable")

    monkeypatch.setattr(door.database, "read", refuse)
    answer = await door.ask("GET", "/jobs", token)
    assert (answer.status_code, answer.json()["code"]) == (503, "database-unavailable")
    assert (await door.ask("GET", "/healthz")).status_code == 200


async def test_without_keys_everybody_is_local(door):
    door.app = Authentication(door.inner, None)
    assert (await door.ask("POST", "/jobs", json=JOB)).status_code == 202
    assert (await door.ask("GET", "/metrics")).status_code == 200
    door.app = Authentication(door.inner, door.ring)
    token = door.token("read", tenant=LOCAL.tenant)
    assert len((await door.ask("GET", "/jobs", token)).json()["jobs"]) == 1


async def test_the_caller_is_the_keys(door):
    seen = []

    async def note(scope, receive, send):
        seen.append(get_principal(Request(scope)))
        await door.inner(scope, receive, send)

    door.app = Authentication(note, door.ring)
    key, token = door.key("submit", "b")
    await door.ask("GET", "/jobs", token)
    await door.ask("GET", "/healthz", token)
    assert seen == [Principal("b", key.id, "submit"), LOCAL]
