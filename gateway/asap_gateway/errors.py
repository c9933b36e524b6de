"""Every error as application/problem+json (RFC 9457), whoever raised it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from asap.errors import AsapError
from asap_gateway.schemas import TAG, ProblemView
from asap_runtime.http_problems import MEDIA_TYPE, answer, pointer, problem
from asap_runtime.logs import get_logger
from asap_runtime.problems import PROBLEMS, describe
from asap_runtime.values import ItemProblem

__all__ = [
    "PROBLEM_RESPONSES",
    "install_handlers",
    "problem_response",
]

_HTTP = {
    400: ("malformed-json", "Malformed request"),
    404: ("not-found", "Not found"),
    405: ("method-not-allowed", "Method not allowed"),
    406: ("not-acceptable", "Not acceptable"),
    413: ("payload-too-large", "Payload too large"),
    415: ("unsupported-media-type", "Unsupported media type"),
}

_ITEM_STATUS = {
    error.code: (row.status, row.title) for error, row in PROBLEMS.items() if row.status != 500
} | {"no-code": (422, "Invalid input"), "cancelled": (409, "Cancelled")}

PROBLEM_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {
        "description": title,
        "model": ProblemView,
        "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemView"}}},
    }
    for status, title in {
        400: "The body is no JSON",
        401: "No live API key",
        402: "The estimate is above the job's cost cap",
        403: "The key's role does not allow it",
        404: "No such object, or not yours",
        406: "No such media type",
        409: "The object's state does not allow it",
        413: "Too large",
        415: "Not the media type that is taken, or compressed in transfer",
        422: "A value cannot work; `errors` holds JSON pointers",
        429: "Overloaded; try again after `retry_after_s`",
        503: "A dependency is gone; try again",
        507: "The server's disk is nearly full; try again later",
    }.items()
}


def install_handlers(app: FastAPI) -> None:
    """Register the handlers; nothing else turns an exception into an answer."""

    @app.exception_handler(AsapError)
    async def on_asap_error(request: Request, error: AsapError) -> JSONResponse:
        return answer(request.url.path, describe(error))

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        if any(wrong["type"] == "json_invalid" for wrong in error.errors()):
            return answer(request.url.path, _http_problem(400, "the body is no JSON"))
        errors = [
            # never the value: it may be a CoT
            {"pointer": _pointer(wrong["loc"]), "detail": wrong["msg"]}
            for wrong in error.errors()
        ]
        first = errors[0]
        detail = f"{first['pointer'] or 'the request'}: {first['detail']}"
        members = problem(422, "invalid-input", "Invalid input", detail)
        return answer(request.url.path, {**members, "errors": errors})

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> JSONResponse:
        response = answer(request.url.path, _http_problem(error.status_code, str(error.detail)))
        response.headers.update(error.headers or {})
        if error.status_code == 405:  # the framework names the methods of one route only
            response.headers["Allow"] = ", ".join(_methods(app, request))
        return response

    @app.exception_handler(Exception)
    async def on_crash(request: Request, error: Exception) -> JSONResponse:
        get_logger().error("request.crashed", path=request.url.path, exc_info=error)
        return answer(request.url.path, describe(AsapError("an error of ours; the log has it")))


def _pointer(location: Sequence[str | int]) -> str:
    """Into the body; without the parts that name a kind of body."""
    return pointer([part for part in location[1:] if not str(part).startswith(TAG)])


def _methods(app: FastAPI, request: Request) -> list[str]:
    """The methods of the path as described; a path without parameters goes before a pattern."""
    paths = app.openapi()["paths"]
    if request.url.path in paths:
        return sorted(method.upper() for method in paths[request.url.path])
    allowed: set[str] = set()
    for path, operations in paths.items():
        pattern = re.sub(r"\\{\w+\\}", "[^/]+", re.escape(path))
        if re.fullmatch(pattern, request.url.path):
            allowed |= {method.upper() for method in operations}
    return sorted(allowed)


def problem_response(request: Request, stored: ItemProblem | None) -> JSONResponse:
    """An item's stored problem as the answer of the request that waited for it."""
    code = stored.code if stored is not None else "internal-error"
    detail = stored.detail if stored is not None else "the item has no result"
    status, title = _ITEM_STATUS.get(code, (500, "Internal error"))
    return answer(request.url.path, problem(status, code, title, detail))


def _http_problem(status: int, detail: str) -> dict[str, object]:
    code, title = _HTTP.get(status, ("internal-error", "Error"))
    return problem(status, code, title, detail)
