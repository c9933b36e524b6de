"""Every request that may change something becomes an entry of the audit trail."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asap_gateway.auth import SAFE, principal
from asap_runtime.audit import AuditTrail
from asap_runtime.http_problems import OPENAI_PATHS
from asap_runtime.logs import get_logger

__all__ = ["Audit"]

NO_OBJECT = "-"


def _may_change(scope: Scope) -> bool:
    """A live completion is a POST that leaves nothing behind."""
    return scope["method"] not in SAFE and not scope["path"].startswith(OPENAI_PATHS)


class Audit:
    """ASGI middleware; stands last, next to the routes. Records once the answer is sent.

    The action is the route, the object what its path or the answer's Location names, the result
    the status. What reached no route (refused, unknown, answered again) has done nothing and is
    left out.
    """

    def __init__(self, app: ASGIApp, trail: AuditTrail) -> None:
        self._app, self._trail = app, trail

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and record it."""
        if scope["type"] != "http" or not _may_change(scope):
            await self._app(scope, receive, send)
            return
        status, location = 500, ""

        async def noted(message: Message) -> None:
            nonlocal status, location
            if message["type"] == "http.response.start":
                status = message["status"]
                location = Headers(raw=message["headers"]).get("location", "")
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            if "route" in scope:
                await asyncio.to_thread(self._record, scope, status, location)

    def _record(self, scope: Scope, status: int, location: str) -> None:
        caller = principal(scope)
        named = [str(value) for value in scope["path_params"].values()]
        try:
            self._trail.record(
                tenant=caller.tenant,
                actor=caller.key_id,
                action=f"{scope['method']} {scope['route'].path}",
                object="/".join(named) or location.rpartition("/")[2] or NO_OBJECT,
                result=str(status),
                request_id=Headers(scope=scope).get("x-request-id"),
            )
        except Exception as error:  # the answer is out; the log is what is left
            get_logger().error(
                "audit.failed", action=scope["route"].path, actor=caller.key_id, exc_info=error
            )
