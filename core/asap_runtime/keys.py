"""API keys: made, verified, listed, revoked. The table holds a keyed hash, never the secret.

A token is `asap_<id>_<secret>`, both parts hexadecimal: 16 and 64 characters. The secret is random,
so one HMAC-SHA256 with the server's pepper is enough; who has the table alone can try nothing.
"""

from __future__ import annotations

import hmac
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

from sqlalchemy import RowMapping, Select, case, func, insert, or_, select, text, update

from asap.errors import InvalidInput, UpstreamUnavailable
from asap_runtime.database import SECOND, Database, after, now
from asap_runtime.logs import get_logger
from asap_runtime.tables import api_keys

__all__ = ["KeyRing", "KeyView", "Role", "allows"]

Role = Literal["read", "submit", "admin"]
ROLES: Final[tuple[Role, ...]] = get_args(Role)
"""Each may do what those before it may."""
State = Literal["live", "expired", "revoked"]

MAX_LIVE = 2
"""Live keys of one name: the old one and its successor."""
CACHED_S = 4.0
"""A revocation holds on all replicas within 5 s."""
CACHED_KEYS = 4096
USE_NOTED_S = 60.0

_TOKEN = re.compile(r"asap_([0-9a-f]{16})_([0-9a-f]{64})")
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NO_HASH = "0" * 64
"""What the secret of an unknown id is compared with, so that it takes as long as a known one."""

_STATE = case(
    (api_keys.c.revoked_at.is_not(None), "revoked"),
    (api_keys.c.expires_at <= now(), "expired"),
    else_="live",
)
_USE_IS_DUE = or_(api_keys.c.last_used_at.is_(None), api_keys.c.last_used_at < after(-USE_NOTED_S))
_SHOWN = (
    api_keys.c.id,
    api_keys.c.tenant,
    api_keys.c.name,
    api_keys.c.role,
    _STATE.label("state"),
    api_keys.c.created_at,
    api_keys.c.expires_at,
    api_keys.c.last_used_at,
)


@dataclass(frozen=True, slots=True)
class KeyView:
    """A key without its secret. Times are microseconds since the epoch."""

    id: str
    tenant: str
    name: str
    role: Role
    state: State
    created_at: int
    expires_at: int | None
    last_used_at: int | None
    """Coarse: at most one note a minute."""


def allows(role: Role, needed: Role) -> bool:
    """Whether a key of this role may do what needs the other."""
    return ROLES.index(role) >= ROLES.index(needed)


@dataclass(slots=True)
class _Known:
    """A row as it was read; good until that moment of this process's clock."""

    view: KeyView
    secret_hash: str = field(repr=False)
    until: float
    use_is_due: bool


class KeyRing:
    """The keys of all tenants. Blocking; safe to share between threads.

    Args:
        database: holds the keys and the only clock that expiry knows.
        pepper: of the settings, see `asap_runtime.pepper`.
        clock: seconds, for the age of what is cached.
    """

    def __init__(
        self, database: Database, pepper: bytes, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._database, self._pepper, self._clock = database, pepper, clock
        self._lock = threading.Lock()
        self._cache: OrderedDict[str, _Known] = OrderedDict()

    def create(
        self, tenant: str, name: str, role: str, expires_in_s: float | None = None
    ) -> tuple[KeyView, str]:
        """A new key and its token, which nobody can see again.

        A name may have two live keys at a time, so that one can follow the other without a gap.
        Raises InvalidInput for a third, and for a value that cannot be used.
        """
        _check(tenant, name, role, expires_in_s)
        key_id, secret = secrets.token_hex(8), secrets.token_hex(32)
        view = self._add(key_id, secret, tenant, name, role, expires_in_s)
        return view, f"asap_{key_id}_{secret}"

    def ensure(self, tenant: str, name: str, role: str, token: str) -> KeyView:
        """The key of a token that was made elsewhere, such as in a cluster's secret; it is added
        when its id is unknown, and left as it is, revoked or not, when it is known.

        Raises InvalidInput for what has not the form of a token, and where `create` would.
        """
        _check(tenant, name, role, None)
        match = _TOKEN.fullmatch(token)
        if match is None:
            raise InvalidInput("the key must have the form asap_16 hex digits_64 hex digits")
        key_id, secret = match.groups()
        for view in self.list():
            if view.id == key_id:
                return view
        return self._add(key_id, secret, tenant, name, role, None)

    def _add(
        self,
        key_id: str,
        secret: str,
        tenant: str,
        name: str,
        role: str,
        expires_in_s: float | None,
    ) -> KeyView:
        row = insert(api_keys).values(
            id=key_id,
            tenant=tenant,
            name=name,
            role=role,
            secret_hash=self._hash(secret),
            created_at=now(),
            expires_at=None if expires_in_s is None else after(expires_in_s),
        )
        live = select(func.count()).where(
            api_keys.c.tenant == tenant, api_keys.c.name == name, _STATE == "live"
        )
        with self._database.write() as connection:
            if not self._database.is_sqlite:
                # Two that count at once would each see one key less.
                connection.execute(text("LOCK TABLE api_keys IN SHARE ROW EXCLUSIVE MODE"))
            if connection.execute(live).scalar_one() >= MAX_LIVE:
                raise InvalidInput(
                    f"{name!r} of tenant {tenant!r} has {MAX_LIVE} live keys; revoke one first"
                )
            connection.execute(row)
            shown = select(*_SHOWN).where(api_keys.c.id == key_id)
            return KeyView(**connection.execute(shown).mappings().one())

    def verify(self, token: str) -> KeyView | None:
        """The live key of the token; None when it is malformed, unknown, expired or revoked.

        Reads the database at most once in 4 s for a key. Raises UpstreamUnavailable.
        """
        match = _TOKEN.fullmatch(token)
        if match is None:
            return None
        key_id, secret = match.groups()
        known = self._recall(key_id) or self._look_up(key_id)
        stored = _NO_HASH if known is None else known.secret_hash
        is_right = hmac.compare_digest(self._hash(secret), stored)
        if known is None or not is_right or known.view.state != "live":
            return None
        if known.use_is_due:
            known.use_is_due = False
            self._note_use(key_id)
        return known.view

    def list(self, tenant: str | None = None) -> tuple[KeyView, ...]:
        """All keys, or those of one tenant, oldest first within a tenant."""
        statement = select(*_SHOWN).order_by(
            api_keys.c.tenant, api_keys.c.created_at, api_keys.c.id
        )
        if tenant is not None:
            statement = statement.where(api_keys.c.tenant == tenant)
        with self._database.read() as connection:
            return tuple(KeyView(**row) for row in connection.execute(statement).mappings())

    def revoke(self, key_id: str) -> KeyView | None:
        """End the key, within 5 s everywhere; safe to repeat. None: there is no such key."""
        is_key = api_keys.c.id == key_id
        once = update(api_keys).where(is_key, api_keys.c.revoked_at.is_(None))
        with self._database.write() as connection:
            connection.execute(once.values(revoked_at=now()))
            row = connection.execute(select(*_SHOWN).where(is_key)).mappings().one_or_none()
        with self._lock:
            self._cache.pop(key_id, None)
        return None if row is None else KeyView(**row)

    def any_live(self) -> bool:
        """Whether there is a key that opens the door."""
        return self._any(select(api_keys.c.id).where(_STATE == "live"))

    def any_made(self) -> bool:
        """Whether there ever was a key: the door of such a server stays shut without one."""
        return self._any(select(api_keys.c.id))

    def _any(self, statement: Select[Any]) -> bool:
        with self._database.read() as connection:
            return connection.execute(statement.limit(1)).first() is not None

    def _hash(self, secret: str) -> str:
        return hmac.digest(self._pepper, secret.encode(), "sha256").hex()

    def _recall(self, key_id: str) -> _Known | None:
        with self._lock:
            known = self._cache.get(key_id)
            if known is None or self._clock() >= known.until:
                return None
            self._cache.move_to_end(key_id)
            return known

    def _look_up(self, key_id: str) -> _Known | None:
        asked_at = self._clock()  # before the reading, which may take its time
        statement = select(
            *_SHOWN,
            api_keys.c.secret_hash,
            (api_keys.c.expires_at - now()).label("left"),
            _USE_IS_DUE.label("use_is_due"),
        ).where(api_keys.c.id == key_id)
        with self._database.read() as connection:
            row = connection.execute(statement).mappings().one_or_none()
        if row is None:
            return None
        known = _known(row, asked_at)
        with self._lock:
            self._cache[key_id] = known
            self._cache.move_to_end(key_id)
            if len(self._cache) > CACHED_KEYS:
                self._cache.popitem(last=False)
        return known

    def _note_use(self, key_id: str) -> None:
        statement = (
            update(api_keys).where(api_keys.c.id == key_id, _USE_IS_DUE).values(last_used_at=now())
        )
        try:
            with self._database.write() as connection:
                connection.execute(statement)
        except UpstreamUnavailable:  # the request can do without
            get_logger().warning("key.use_not_noted", key_id=key_id)


def _known(row: RowMapping, asked_at: float) -> _Known:
    values = dict(row)
    left, secret_hash = values.pop("left"), values.pop("secret_hash")
    use_is_due = bool(values.pop("use_is_due"))
    cached_s = CACHED_S if left is None else min(CACHED_S, left / SECOND)
    return _Known(KeyView(**values), secret_hash, asked_at + cached_s, use_is_due)


def _check(tenant: str, name: str, role: str, expires_in_s: float | None) -> None:
    if not _TENANT.fullmatch(tenant):
        raise InvalidInput(
            "a tenant has 1 to 64 letters, digits, dots, dashes and underscores, "
            "and begins with a letter or a digit"
        )
    if not (1 <= len(name) <= 128 and name.isprintable() and name.strip() == name):
        raise InvalidInput(
            "a key's name has 1 to 128 printable characters and no blank at its ends"
        )
    if role not in ROLES:
        raise InvalidInput(f"unknown role {role!r}; known: {', '.join(ROLES)}")
    if expires_in_s is not None and expires_in_s <= 0:
        raise InvalidInput("a key expires after more than 0 seconds")
