from __future__ import annotations

import os

import pytest
from typer.testing import CliRunner

from asap.errors import InvalidInput, NotFound
from asap_cli.keys import keys_app
from asap_runtime.audit import AuditTrail
from asap_runtime.database import Database, open_engine
from asap_runtime.host import open_database
from asap_runtime.keys import KeyRing
from asap_runtime.pepper import KeySettings, load_pepper
from asap_runtime.settings import load_settings


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("ASAP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ASAP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def keys():
    """Run `asap keys ARGS`."""
    return lambda *args: CliRunner().invoke(keys_app, [str(arg) for arg in args])


@pytest.fixture
def server():
    """What a server of the same settings would open."""
    settings = load_settings(KeySettings)
    database = open_database(settings)
    yield database, KeyRing(database, load_pepper(settings.auth, settings.home))
    database.close()


def test_the_key_alone_is_on_stdout_and_opens(keys, server):
    ran = keys("create", "--name", "laptop")
    assert ran.exit_code == 0, ran.stderr
    token = ran.stdout.removesuffix("\n")
    assert token == token.strip()
    key = server[1].verify(token)
    assert key is not None
    assert (key.tenant, key.name, key.role, key.expires_at) == ("local", "laptop", "submit", None)
    assert token not in ran.stderr
    assert token.split("_")[2] not in ran.stderr
    assert key.id in ran.stderr


def test_a_key_has_the_tenant_role_and_end_it_was_given(keys, server):
    options = ("--tenant", "b", "--name", "ci", "--role", "admin", "--expires-days", 30)
    key = server[1].verify(keys("create", *options).stdout.strip())
    assert (key.tenant, key.name, key.role) == ("b", "ci", "admin")
    assert key.expires_at - key.created_at == 30 * 24 * 3600 * 1_000_000


def test_the_list_shows_every_key_and_no_secret(keys, server):
    tokens = [
        keys("create", "--tenant", tenant, "--name", "x [bold]" * 4).stdout.strip()
        for tenant in "ab"
    ]
    keys("revoke", tokens[1].split("_")[1])
    ran = keys("list")
    lines = ran.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["id", *(t.split("_")[1] for t in tokens)]
    assert "live" in lines[1]
    assert "revoked" in lines[2]
    assert "x [bold]" * 4 in lines[1]
    assert not [token for token in tokens if token.split("_")[2] in ran.output]
    assert len(keys("list", "--tenant", "b").stdout.splitlines()) == 2


def test_a_revoked_key_opens_nothing(keys, server):
    token = keys("create", "--name", "laptop").stdout.strip()
    for _ in range(2):
        ran = keys("revoke", token.split("_")[1])
        assert (ran.exit_code, ran.stdout) == (0, "")
    assert server[1].verify(token) is None


def test_keys_made_and_revoked_are_audited(keys, server):
    token = keys("create", "--tenant", "b", "--name", "x").stdout.strip()
    keys("revoke", token.split("_")[1])
    acts = [
        (entry.actor, entry.action, entry.object) for entry in AuditTrail(server[0]).entries("b")
    ]
    who, key_id = f"uid:{os.getuid()}", token.split("_")[1]
    assert acts == [(who, "asap keys revoke", key_id), (who, "asap keys create", key_id)]


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (("revoke", "nobody"), NotFound),
        (("create", "--name", "x", "--role", "root"), InvalidInput),
        (("create", "--name", "x", "--tenant", "../y"), InvalidInput),
    ],
)
def test_what_cannot_be_done_is_a_problem_and_prints_no_key(keys, server, args, error):
    ran = keys(*args)
    assert isinstance(ran.exception, error)
    assert ran.stdout == ""
    assert server[1].list() == ()


def test_a_key_needs_a_name(keys):
    assert keys("create").exit_code == 2


def test_settings_decide_which_database_and_pepper(keys, tmp_path, monkeypatch):
    url = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    monkeypatch.setenv("ASAP_DATABASE__URL", url)
    monkeypatch.setenv("ASAP_AUTH__PEPPER", "pepper of the tests")
    token = keys("create", "--name", "x").stdout.strip()
    database = Database(open_engine(url))
    assert KeyRing(database, b"pepper of the tests").verify(token) is not None
    assert KeyRing(database, b"pepper of somebody else").verify(token) is None
    database.close()


def test_a_key_from_a_secret_opens_the_server(keys, server, monkeypatch):
    token = f"asap_{'1' * 16}_{'2' * 64}"
    monkeypatch.setenv("ASAP_API_KEY", token)
    for _ in range(2):
        assert keys("ensure", "--name", "cluster", "--role", "admin").exit_code == 0
    _, ring = server
    assert ring.verify(token).role == "admin"


def test_without_a_key_there_is_nothing_to_ensure(keys):
    result = keys("ensure", "--name", "cluster")
    assert isinstance(result.exception, InvalidInput)
