"""Routes with a JSON body: the media type is asked for, and JSON is read by our own rules."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from asap.errors import InvalidInput
from asap_runtime.strict_json import parse_json

__all__ = ["GONE", "JsonRoute", "check_json"]

GONE = 400
"""Status of an answer that nobody hears, because its caller has left."""


class _Parsed(Request):
    """A request whose body has been read and parsed."""

    def __init__(self, request: Request, raw: bytes, value: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._raw, self._value = raw, value

    async def body(self) -> bytes:
        return self._raw

    async def json(self) -> Any:
        return self._value


class JsonRoute(APIRoute):
    """A route that parses its body by `parse_json`, before the framework looks at it.

    415 unless the body is application/json, as it is: a compressed one is not taken.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The framework's hook."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def parsed(request: Request) -> Response:
            try:
                raw = await request.body()
            except ClientDisconnect:
                return Response(status_code=GONE)
            if not raw:  # left to the framework, which names what is missing
                return await handle(_Parsed(request, raw, None))
            check_json(request)
            return await handle(_Parsed(request, raw, parse_json(raw)))

        return parsed


def check_json(request: Request) -> None:
    """Raise InvalidInput (`unsupported-media-type`) unless the body is said to be plain JSON."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" or request.headers.get("content-encoding"):
        raise InvalidInput(
            "the body must be application/json, not compressed in transfer",
            code="unsupported-media-type",
        )
