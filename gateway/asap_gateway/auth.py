"""Who calls: the tenant whose objects a request may see, and what its role lets it do.

The role is checked here, by method and path, and not in the routes: no route can forget it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Annotated, Final

from fastapi import Depends, Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from asap.errors import AsapError, Forbidden, Unauthorized
from asap_runtime.http_problems import answer
from asap_runtime.keys import KeyRing, Role, allows
from asap_runtime.problems import describe

__all__ = ["LOCAL", "SAFE", "Authentication", "Caller", "Principal", "get_principal", "principal"]

OPEN: Final = frozenset({"/healthz", "/readyz"})
"""What probes ask; they hold no key."""
ADMIN: Final = frozenset({"/metrics"})
SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing."""
STATE = "principal"
REFUSAL = (
    "a live API key is needed, as `Authorization: Bearer KEY` or `X-API-Key: KEY`; "
    "there was none, or it is unknown, expired or revoked"
)
"""The same for every cause: nothing is learnt by trying."""


@dataclass(frozen=True, slots=True)
class Principal:
    """The holder of a key, or of no key on a server of this machine alone."""

    tenant: str
    key_id: str
    role: Role = "read"


LOCAL = Principal(tenant="local", key_id="local", role="admin")
"""Everybody on a server without keys."""


def principal(scope: Scope) -> Principal:
    """The caller of the request with this scope, for what stands behind `Authentication`."""
    caller: Principal = scope.get("state", {}).get(STATE, LOCAL)
    return caller


def get_principal(request: Request) -> Principal:
    """The caller of this request."""
    return principal(request.scope)


Caller = Annotated[Principal, Depends(get_principal)]


class Authentication:
    """ASGI middleware: 401 without a live key, 403 when its role is too small; stands first.

    Without a key ring everybody is LOCAL. HTTP only: there are no WebSocket routes.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing | None) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its caller, or refuse it."""
        if scope["type"] == "http" and self._keys is not None and scope["path"] not in OPEN:
            try:
                caller = await _identify(self._keys, scope)
            except AsapError as error:
                await _refuse(error, scope, receive, send)
                return
            scope.setdefault("state", {})[STATE] = caller
        await self._app(scope, receive, send)


async def _identify(keys: KeyRing, scope: Scope) -> Principal:
    token = _token(Headers(scope=scope))
    key = None if token is None else await asyncio.to_thread(keys.verify, token)
    if key is None:
        raise Unauthorized(REFUSAL)
    needed = _needed_role(scope["method"], scope["path"])
    if not allows(key.role, needed):
        raise Forbidden(f"this needs the role {needed!r}; the key has the role {key.role!r}")
    return Principal(key.tenant, key.id, key.role)


def _token(headers: Headers) -> str | None:
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return credentials.strip()
    return headers.get("x-api-key")


def _needed_role(method: str, path: str) -> Role:
    if path in ADMIN:
        return "admin"
    return "read" if method in SAFE else "submit"


async def _refuse(error: AsapError, scope: Scope, receive: Receive, send: Send) -> None:
    response = answer(scope["path"], describe(error))
    if isinstance(error, Unauthorized):
        response.headers["WWW-Authenticate"] = "Bearer"
    await response(scope, receive, send)
