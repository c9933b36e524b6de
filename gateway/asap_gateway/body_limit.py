"""Refuses bodies that are too large while they come in, before anything is parsed."""

from __future__ import annotations

from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asap_gateway.settings import GatewayLimits
from asap_runtime.http_problems import answer, problem

__all__ = ["BodyLimit"]

UPLOAD = "/jobs/upload"


class _TooLarge(Exception):
    pass


class BodyLimit:
    """ASGI middleware: counts the bytes as they come, whatever Content-Length says."""

    def __init__(self, app: ASGIApp, limits: GatewayLimits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        upload = scope["path"] == UPLOAD
        limit = self._limits.max_upload_bytes if upload else self._limits.max_body_bytes
        received, refused = 0, False

        async def counted() -> Message:
            nonlocal received, refused
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                refused = True
                raise _TooLarge
            return message

        async def unless_refused(message: Message) -> None:
            # whoever parsed the body took the exception for a broken body and answers that
            if not refused:
                await send(message)

        with suppress(_TooLarge):
            await self._app(scope, counted, unless_refused)
        if refused:
            detail = f"the body is larger than {limit} bytes"
            members = problem(413, "payload-too-large", "Payload too large", detail)
            await answer(scope["path"], members, Connection="close")(scope, receive, send)
