"""Idempotency-Key on POST: the same request is worked on once, and its repetitions hear the same
answer.

Bodies are read whole to be hashed, so uploads take no key; the body limit stands before this.
"""

from __future__ import annotations

import asyncio
import hashlib
import json

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asap_gateway.body_limit import UPLOAD
from asap_gateway.errors import answer, problem
from asap_runtime.idempotency import First, IdempotencyKeys, InProgress, Replay

__all__ = ["Idempotency"]

HEADER = "idempotency-key"
LONGEST_KEY = 255
KEPT_HEADERS = ("content-type", "location")
NOT_STORED = frozenset({400, 413, 422, 429, 500, 503})
"""Refusals: the repetition is a request of its own."""


class Idempotency:
    """ASGI middleware over the table of keys."""

    def __init__(self, app: ASGIApp, keys: IdempotencyKeys, tenant: str) -> None:
        self._app, self._keys, self._tenant = app, keys, tenant

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, replay, or refuse."""
        key = None
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] != UPLOAD:
            key = Headers(scope=scope).get(HEADER)
        if key is None:
            await self._app(scope, receive, send)
            return
        if not 1 <= len(key) <= LONGEST_KEY:
            await _refusal(scope, 422, "invalid-input", "Idempotency-Key has 1 to 255 characters")(
                scope, receive, send
            )
            return
        body = await _read(receive)
        request_hash = hashlib.sha256(
            f"POST {scope['path']}\n".encode() + _canonical(body)
        ).hexdigest()
        who = await asyncio.to_thread(self._keys.remember, self._tenant, key, request_hash)
        if isinstance(who, First):
            await self._first(scope, body, send, key)
        elif isinstance(who, Replay):
            headers, content = _unpack(who.body)
            headers["Idempotent-Replayed"] = "true"
            await Response(content, who.status, headers)(scope, receive, send)
        elif isinstance(who, InProgress):
            refusal = _refusal(
                scope, 409, "idempotency-in-progress", "this request is being worked on"
            )
            refusal.headers["Retry-After"] = "2"
            await refusal(scope, receive, send)
        else:
            detail = "this key belongs to another request; use a new one"
            await _refusal(scope, 409, "idempotency-mismatch", detail)(scope, receive, send)

    async def _first(self, scope: Scope, body: bytes, send: Send, key: str) -> None:
        sent = False

        async def receive_again() -> Message:
            nonlocal sent
            if sent:
                return {"type": "http.disconnect"}
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

        try:
            await self._app(scope, receive_again, keep)
        finally:
            if status in NOT_STORED:
                await asyncio.to_thread(self._keys.forget, self._tenant, key)
            else:
                packed = json.dumps(headers).encode() + b"\n" + content
                await asyncio.to_thread(
                    self._keys.store_response, self._tenant, key, status, packed
                )


async def _read(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


def _canonical(body: bytes) -> bytes:
    """The same JSON in another order of keys or with other blanks is the same request."""
    try:
        return json.dumps(json.loads(body), sort_keys=True).encode()
    except (ValueError, RecursionError):
        return body


def _unpack(packed: bytes) -> tuple[dict[str, str], bytes]:
    headers, _, content = packed.partition(b"\n")
    return json.loads(headers), content


def _refusal(scope: Scope, status: int, code: str, detail: str) -> JSONResponse:
    return answer(scope["path"], problem(status, code, "Idempotency", detail))
