"""A problem as an HTTP answer: application/problem+json (RFC 9457), the same at every door.

Knows statuses and headers, no routes and no requests.
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import JSONResponse

__all__ = ["MEDIA_TYPE", "answer", "problem"]

MEDIA_TYPE = "application/problem+json"


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
    content = {**members, "instance": path}
    return JSONResponse(content, status_code=status, media_type=MEDIA_TYPE, headers=headers)
