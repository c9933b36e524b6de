"""A problem as an HTTP answer: application/problem+json (RFC 9457), the same at every door but one.

Below /v1 callers are clients of OpenAI's API, so there the answer has the shape that they know.

Knows statuses and headers, no routes and no requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import ValidationError
from starlette.responses import JSONResponse

from asap.errors import InvalidInput

__all__ = [
    "MEDIA_TYPE",
    "OPENAI_PATHS",
    "answer",
    "invalid_input",
    "openai_error",
    "pointer",
    "problem",
]

MEDIA_TYPE = "application/problem+json"
OPENAI_PATHS = "/v1/"
_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def pointer(location: Sequence[str | int]) -> str:
    """A JSON pointer (RFC 6901) into the body."""
    parts = (str(part).replace("~", "~0").replace("/", "~1") for part in location)
    return "".join(f"/{part}" for part in parts)


def invalid_input(error: ValidationError, *root: str, skip: int = 0) -> InvalidInput:
    """What a model refuses, each wrong field named by JSON pointer; never a value, which may be a
    CoT. Locations begin at `root`, without their first `skip` parts.
    """
    errors = [
        {"pointer": pointer((*root, *wrong["loc"][skip:])), "detail": wrong["msg"]}
        for wrong in error.errors(include_url=False, include_input=False)
    ]
    first = errors[0]
    return InvalidInput(f"{first['pointer'] or 'the body'}: {first['detail']}", errors=errors)


def problem(status: int, code: str, title: str, detail: str) -> dict[str, object]:
    """The members of a problem that every one has."""
    return {
        "type": f"urn:asap:problem:{code}",
        "title": title,
        "status": status,
        "detail": detail,
        "code": code,
    }


def answer(path: str, members: Mapping[str, object], **headers: str) -> JSONResponse:
    """A problem as the answer to a request for `path`; `Retry-After` follows from its member."""
    retry_after = members.get("retry_after_s")
    if isinstance(retry_after, int | float):
        headers["Retry-After"] = str(max(1, round(retry_after)))
    status = members["status"]
    assert isinstance(status, int)
    if path.startswith(OPENAI_PATHS):
        return JSONResponse(openai_error(members), _openai_status(status), headers)
    content = {**members, "instance": path}
    return JSONResponse(content, status_code=status, media_type=MEDIA_TYPE, headers=headers)


def openai_error(members: Mapping[str, object]) -> dict[str, object]:
    """The problem in the shape of OpenAI's API; `param` names the field that is wrong."""
    status = members["status"]
    assert isinstance(status, int)
    server = "server_error" if status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": members["detail"],
            "type": _OPENAI_TYPES.get(status, server),
            "param": members.get("field"),
            "code": members["code"],
        }
    }


def _openai_status(status: int) -> int:
    """That API says 400 to whatever is wrong in a request."""
    return 400 if status == 422 else status
