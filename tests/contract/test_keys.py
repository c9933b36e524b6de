"""API keys, on every database."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import event, select, update

from asap.errors import InvalidInput, UpstreamUnavailable
from asap_runtime.database import SECOND, Database, open_engine
from asap_runtime.keys import KeyRing, allows
from asap_runtime.tables import api_keys

PEPPER = b"pepper of the tests"


class Clock:
    """A process's clock, turned by hand."""

    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def ring(database, clock):
    return KeyRing(database, PEPPER, clock=clock)


def pass_time(database, seconds):
    """Move every stored moment back by so much: the database's clock cannot be turned."""
    moments = {c.name: c - round(seconds * SECOND) for c in api_keys.c if c.name.endswith("_at")}
    with database.write() as connection:
        connection.execute(update(api_keys).values(moments))


def statements(database):
    """What is sent to the database from now on."""
    seen = []
    event.listen(
        database.engine,
        "before_cursor_execute",
        lambda connection, cursor, statement, *_: seen.append(statement),
    )
    return seen


def test_a_token_opens_with_its_key_and_is_stored_nowhere(ring, database):
    key, token = ring.create("a", "laptop", "submit")
    assert (key.tenant, key.name, key.role, key.state) == ("a", "laptop", "submit", "live")
    seen = ring.verify(token)
    assert seen is not None
    assert (seen.id, seen.tenant, seen.role) == (key.id, "a", "submit")
    prefix, key_id, secret = token.split("_")
    assert (prefix, key_id, len(secret)) == ("asap", key.id, 64)
    with database.read() as connection:
        row = connection.execute(select(api_keys)).one()
    assert secret not in str(row)
    assert secret not in repr(key)


def test_only_the_whole_right_token_opens(ring):
    key, token = ring.create("a", "laptop", "read")
    _, other = ring.create("b", "laptop", "read")
    secret, other_secret = token.split("_")[2], other.split("_")[2]
    wrong = [
        f"asap_{key.id}_{other_secret}",
        f"asap_{'0' * 16}_{secret}",
        f"asap_{key.id}_{secret[:-1]}",
        f"asap_{key.id}_",
        f"asap_{key.id}",
        f"asap__{secret}",
        token.upper(),
        f"{token}\n",
        f" {token}",
        token.removeprefix("asap_"),
        f"asap_{key.id}\0_{secret}",
        f"asap_{key.id}_{'é' * 64}",
        "",
        "asap_" * 100_000,
    ]
    for cached in (False, True):
        assert [token for token in wrong if ring.verify(token) is not None] == []
        assert ring.verify(token), cached
        assert ring.verify(other), cached


def test_another_pepper_makes_the_keys_invalid(ring, database):
    _, token = ring.create("a", "laptop", "read")
    assert KeyRing(database, b"another pepper").verify(token) is None
    assert ring.verify(token) is not None


def test_a_revoked_key_opens_nothing_at_once_here_and_in_5_s_elsewhere(ring, database, clock):
    other = KeyRing(database, PEPPER, clock=clock)
    key, token = ring.create("a", "laptop", "read")
    assert ring.verify(token)
    assert other.verify(token)
    revoked = ring.revoke(key.id)
    assert revoked is not None
    assert revoked.state == "revoked"
    assert ring.verify(token) is None
    assert other.verify(token) is not None, "the other replica has not looked yet"
    clock.now += 5
    assert other.verify(token) is None


def test_revoking_is_safe_to_repeat_and_knows_its_keys(ring):
    key, _ = ring.create("a", "laptop", "read")
    assert ring.revoke(key.id) == ring.revoke(key.id)
    assert ring.revoke("nobody") is None
    assert ring.list()[0].state == "revoked"


def test_an_expired_key_opens_nothing(ring, database, clock):
    _, token = ring.create("a", "laptop", "read", expires_in_s=3600)
    pass_time(database, 3000)
    assert ring.verify(token) is not None
    pass_time(database, 601)
    clock.now += 5
    assert ring.verify(token) is None
    assert ring.list()[0].state == "expired"


def test_what_is_cached_ends_with_the_key(ring, database, clock, monkeypatch):
    monkeypatch.setattr("asap_runtime.keys.CACHED_S", 1000.0)
    _, token = ring.create("a", "laptop", "read", expires_in_s=3600)
    pass_time(database, 3000)
    assert ring.verify(token) is not None
    clock.now += 600
    pass_time(database, 600)
    assert ring.verify(token) is None


def test_a_key_is_read_once_in_a_while_not_for_each_request(ring, database, clock):
    _, token = ring.create("a", "laptop", "read")
    wrong = token[:-4] + ("0000" if token[-4:] != "0000" else "1111")
    ring.verify(token)
    seen = statements(database)
    for _ in range(50):
        assert ring.verify(token)
        assert ring.verify(wrong) is None
    assert seen == []
    clock.now += 5
    ring.verify(token)
    assert [s for s in seen if "api_keys" in s]


def test_what_is_cached_is_bounded(ring, database, monkeypatch):
    monkeypatch.setattr("asap_runtime.keys.CACHED_KEYS", 2)
    tokens = [ring.create("a", str(n), "read")[1] for n in range(3)]
    for token in tokens:
        ring.verify(token)
    seen = statements(database)
    ring.verify(tokens[2])
    ring.verify(tokens[1])
    assert seen == []
    ring.verify(tokens[0])
    assert seen


def test_the_last_use_is_noted_once_a_minute(ring, database, clock):
    key, token = ring.create("a", "laptop", "read")
    assert key.last_used_at is None
    ring.verify(token)
    first = ring.list()[0].last_used_at
    assert first is not None
    pass_time(database, 30)
    for _ in range(3):
        clock.now += 5
        ring.verify(token)
        assert ring.list()[0].last_used_at == first - 30 * SECOND
    pass_time(database, 31)
    clock.now += 5
    ring.verify(token)
    assert ring.list()[0].last_used_at >= first


def test_a_wrong_secret_is_no_use(ring):
    _, token = ring.create("a", "laptop", "read")
    ring.verify(token[:-4] + ("0000" if token[-4:] != "0000" else "1111"))
    assert ring.list()[0].last_used_at is None
    ring.verify(token)
    assert ring.list()[0].last_used_at is not None


def test_a_use_that_cannot_be_noted_fails_nobody(ring, database, monkeypatch):
    _, token = ring.create("a", "laptop", "read")

    def refuse():
        raise UpstreamUnavailable("no", code="database-unavailable")

    monkeypatch.setattr(database, "write", refuse)
    assert ring.verify(token) is not None


def test_a_name_has_two_live_keys_for_its_rotation(ring, database):
    old, old_token = ring.create("a", "laptop", "read")
    _, new_token = ring.create("a", "laptop", "read", expires_in_s=60)
    assert ring.verify(old_token)
    assert ring.verify(new_token)
    with pytest.raises(InvalidInput, match="2 live keys"):
        ring.create("a", "laptop", "read")
    ring.create("b", "laptop", "read")
    ring.create("a", "desktop", "read")
    ring.revoke(old.id)
    ring.create("a", "laptop", "read")
    pass_time(database, 61)
    ring.create("a", "laptop", "read")
    assert Counter(key.state for key in ring.list("a")) == {"live": 3, "revoked": 1, "expired": 1}


def test_of_many_made_at_once_two_are_made(ring):
    def make(_):
        try:
            return ring.create("a", "laptop", "read")[0].id
        except InvalidInput:
            return None

    with ThreadPoolExecutor(4) as pool:
        made = {key for key in pool.map(make, range(8)) if key}
    assert {key.id for key in ring.list()} == made
    assert len(made) == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tenant", ""), ("tenant", "../b"), ("tenant", ".."), ("tenant", "a/b"), ("tenant", "a\n"),
        ("tenant", "x" * 65), ("name", ""), ("name", " x"), ("name", "a\x1b[31m"),
        ("name", "x" * 129), ("role", "root"), ("role", ""), ("expires_in_s", 0),
        ("expires_in_s", -1),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(ring, field, value):
    given = {"tenant": "a", "name": "laptop", "role": "read", "expires_in_s": None, field: value}
    with pytest.raises(InvalidInput):
        ring.create(**given)
    assert ring.list() == ()


def test_keys_are_listed_by_tenant_in_order(ring, database):
    for tenant, name in (("b", "1"), ("a", "1"), ("a", "2")):
        ring.create(tenant, name, "admin")
        pass_time(database, 1)
    assert [(key.tenant, key.name) for key in ring.list()] == [("a", "1"), ("a", "2"), ("b", "1")]
    assert [(key.tenant, key.name) for key in ring.list("b")] == [("b", "1")]


def test_live_keys_and_keys_of_any_state_are_told_apart(ring, database):
    assert not ring.any_live()
    assert not ring.any_made()
    ring.create("a", "laptop", "read", expires_in_s=60)
    other, _ = ring.create("a", "desktop", "read")
    ring.revoke(other.id)
    assert ring.any_live()
    pass_time(database, 61)
    assert not ring.any_live()
    assert ring.any_made()


def test_each_role_may_what_the_smaller_may():
    roles = ("read", "submit", "admin")
    table = [[allows(role, needed) for needed in roles] for role in roles]
    assert table == [[True, False, False], [True, True, False], [True, True, True]]


def test_a_database_that_is_away_is_no_wrong_key(tmp_path):
    url = f"sqlite:///{tmp_path / 'missing' / 'asap.db'}"
    database = Database(open_engine(url))
    with pytest.raises(UpstreamUnavailable):
        KeyRing(database, PEPPER).verify(f"asap_{'0' * 16}_{'0' * 64}")
    database.close()


def test_a_key_made_elsewhere_is_added_once(ring):
    token = f"asap_{'1' * 16}_{'2' * 64}"
    first = ring.ensure("a", "cluster", "admin", token)
    assert ring.ensure("a", "cluster", "admin", token) == first
    assert ring.verify(token).id == "1" * 16
    assert len(ring.list()) == 1


def test_a_revoked_key_stays_revoked(ring):
    token = f"asap_{'1' * 16}_{'2' * 64}"
    ring.revoke(ring.ensure("a", "cluster", "admin", token).id)
    assert ring.ensure("a", "cluster", "admin", token).state == "revoked"
    assert ring.verify(token) is None


@pytest.mark.parametrize("token", ["", "secret", f"asap_{'1' * 16}_{'g' * 64}"])
def test_only_a_well_formed_key_is_added(ring, token):
    with pytest.raises(InvalidInput, match="form"):
        ring.ensure("a", "cluster", "admin", token)
    assert ring.list() == ()
