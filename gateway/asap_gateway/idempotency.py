"""Idempotency-Key on POST: the same request is worked on once, and its repetitions hear the same
answer.

Bodies are read whole to be hashed, so uploads take no key; live completions, whose answers stream,
take none either. The body limit stands before this.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping

from fastapi import Request
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asap_gateway.auth import get_principal
from asap_gateway.body_limit import UPLOAD
from asap_gateway.service import Gateway
from asap_runtime.http_problems import OPENAI_PATHS, answer, problem
from asap_runtime.idempotency import First, IdempotencyKeys, InProgress, Mismatch, Replay

__all__ = ["Idempotency", "idempotency_key", "repetition", "store"]

HEADER = "idempotency-key"
STATE = "idempotency_key"
LONGEST_KEY = 255
KEPT_HEADERS = ("content-type", "location")
NOT_STORED = frozenset({400, 402, 406, 413, 415, 422, 429, 500, 503, 507})
"""Refusals: the repetition is a request of its own."""


def idempotency_key(request: Request) -> str | None:
    """The key of this request, once the middleware has found it to be the first with it."""
    key: str | None = getattr(request.state, STATE, None)
    return key


class Idempotency:
    """ASGI middleware over the table of keys; stands behind authentication."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app, self._gateway, self._keys = app, gateway, gateway.idempotency

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, replay, or refuse."""
        key = None
        if scope["type"] == "http" and scope["method"] == "POST" and not _streams(scope["path"]):
            key = Headers(scope=scope).get(HEADER)
        if key is None:
            await self._app(scope, receive, send)
            return
        if not 1 <= len(key) <= LONGEST_KEY:
            await _refusal(
                scope["path"], 422, "invalid-input", "Idempotency-Key has 1 to 255 characters"
            )(scope, receive, send)
            return
        tenant = get_principal(Request(scope)).tenant
        try:
            body = await _read(receive)
        except ClientDisconnect:
            return
        request_hash = hashlib.sha256(
            f"POST {scope['path']}\n".encode() + _canonical(body)
        ).hexdigest()
        who = await asyncio.to_thread(self._keys.remember, tenant, key, request_hash)
        if isinstance(who, First):
            await self._first(scope, receive, send, body, tenant, key)
        else:
            again = await asyncio.to_thread(repetition, self._gateway, tenant, scope["path"], who)
            await again(scope, receive, send)

    async def _first(
        self, scope: Scope, receive: Receive, send: Send, body: bytes, tenant: str, key: str
    ) -> None:
        sent = False

        async def receive_again() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        status, content, headers = 500, b"", {}

        async def keep(message: Message) -> None:
            nonlocal status, content, headers
            if message["type"] == "http.response.start":
                status = message["status"]
                given = Headers(raw=message["headers"])
                headers = {name: given[name] for name in KEPT_HEADERS if name in given}
            content += message.get("body", b"")
            await send(message)

        state = {**scope.get("state", {}), STATE: key}
        try:
            await self._app({**scope, "state": state}, receive_again, keep)
        finally:
            await asyncio.to_thread(store, self._keys, tenant, key, status, headers, content)


def store(
    keys: IdempotencyKeys,
    tenant: str,
    key: str,
    status: int,
    headers: Mapping[str, str],
    content: bytes,
) -> None:
    """Keep an answer for the repetitions; a refusal is forgotten."""
    if status in NOT_STORED:
        keys.forget(tenant, key)
    else:
        keys.store_response(
            tenant, key, status, json.dumps(dict(headers)).encode() + b"\n" + content
        )


def repetition(
    gateway: Gateway, tenant: str, path: str, who: Replay | InProgress | Mismatch
) -> Response:
    """The answer to a request whose key has been seen."""
    if isinstance(who, Replay):
        headers, content = _unpack(who.body)
        headers["Idempotent-Replayed"] = "true"
        return Response(content, who.status, headers)
    if isinstance(who, Mismatch):
        detail = "this key belongs to another request; use a new one"
        return _refusal(path, 409, "idempotency-mismatch", detail)
    if who.job_id is not None:
        # The first request may have died: what it began is found by this address.
        body = gateway.job(tenant, who.job_id).model_dump(mode="json")
        headers = {"Location": f"/jobs/{who.job_id}", "Idempotent-Replayed": "true"}
        return JSONResponse(body, 202, headers)
    refusal = _refusal(path, 409, "idempotency-in-progress", "this request is being worked on")
    refusal.headers["Retry-After"] = "2"
    return refusal


async def _read(receive: Receive) -> bytes:
    """The whole body. Raises ClientDisconnect when it does not come whole."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body)


def _streams(path: str) -> bool:
    """Whether a body, or what is answered, is too long to be kept."""
    return path == UPLOAD or path.startswith(OPENAI_PATHS)


def _canonical(body: bytes) -> bytes:
    """The same JSON in another order of keys or with other blanks is the same request."""
    try:
        return json.dumps(json.loads(body), sort_keys=True).encode()
    except (ValueError, RecursionError):
        return body


def _unpack(packed: bytes) -> tuple[dict[str, str], bytes]:
    headers, _, content = packed.partition(b"\n")
    return json.loads(headers), content


def _refusal(path: str, status: int, code: str, detail: str) -> JSONResponse:
    return answer(path, problem(status, code, "Idempotency", detail))
