"""POST /jobs/upload: the file to the blob store, a look at its first lines, a job, an answer.

Its lines are taken in later, in the background.
"""

from __future__ import annotations

import asyncio
import hashlib
import json

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from asap.errors import AsapError, InvalidInput
from asap_gateway.idempotency import HEADER, LONGEST_KEY, repetition, store
from asap_gateway.json_body import GONE
from asap_gateway.multipart import Upload, receive
from asap_gateway.schemas import JobOptions
from asap_gateway.service import Gateway
from asap_runtime.http_problems import pointer
from asap_runtime.idempotency import First
from asap_runtime.strict_json import parse_json

__all__ = ["UPLOAD_BODY", "accepted", "take_upload"]

UPLOAD_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "JSONL, JSONL.gz or Parquet; the name tells which",
                        },
                        "options": {
                            "type": "string",
                            "maxLength": 10_000,
                            "default": "{}",
                            "description": "JobOptions as JSON",
                        },
                    },
                }
            }
        },
    }
}


async def take_upload(gateway: Gateway, tenant: str, request: Request) -> Response:
    """The answer to an upload: 202 with the job, or that of an earlier one with the same key."""
    key = request.headers.get(HEADER)
    if key is not None and not 1 <= len(key) <= LONGEST_KEY:
        raise InvalidInput("Idempotency-Key has 1 to 255 characters")
    await asyncio.to_thread(gateway.submissions.admit, tenant, 0)
    try:
        upload = await receive(request, gateway.submissions.blobs, tenant)
    except ClientDisconnect:
        return Response(status_code=GONE)
    return await asyncio.to_thread(_answer, gateway, tenant, request, upload, key)


def accepted(gateway: Gateway, tenant: str, request: Request, job_id: str) -> JSONResponse:
    """202 with the job and its address. Blocking."""
    view = gateway.job(tenant, job_id)
    location = request.url_for("get_job", job_id=job_id).path
    return JSONResponse(view.model_dump(mode="json"), 202, headers={"Location": location})


def _answer(
    gateway: Gateway, tenant: str, request: Request, upload: Upload, key: str | None
) -> Response:
    """The file is the job's from the moment there is one; before it is ours to delete."""
    job_id = None
    try:
        options = _options(upload.options)
        source = gateway.submissions.stored(upload.key, upload.ending, owned=True)
        if options.dry_run:
            planned = gateway.submissions.estimate_stored(source, options)
            return JSONResponse(planned.model_dump(mode="json"))
        if key is not None:
            digest = _request_hash(request.url.path, options, upload)
            who = gateway.idempotency.remember(tenant, key, digest)
            if not isinstance(who, First):
                return repetition(gateway, tenant, request.url.path, who)
        try:
            job_id = gateway.submissions.submit_stored(tenant, source, options, key)
        except BaseException:
            if key is not None:
                gateway.idempotency.forget(tenant, key)
            raise
    finally:
        if job_id is None:
            gateway.submissions.blobs.delete(upload.key)
    response = accepted(gateway, tenant, request, job_id)
    if key is not None:
        headers = {name: response.headers[name] for name in ("content-type", "location")}
        store(gateway.idempotency, tenant, key, 202, headers, bytes(response.body))
    return response


def _options(raw: bytes) -> JobOptions:
    try:
        return JobOptions.model_validate(parse_json(raw))
    except AsapError as error:
        raise InvalidInput(
            f"/options: {error.detail}",
            code=error.problem_code,
            errors=[{"pointer": "/options", "detail": error.detail}],
        ) from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = pointer(("options", *first["loc"]))
        raise InvalidInput(
            f"{where}: {first['msg']}", errors=[{"pointer": where, "detail": first["msg"]}]
        ) from None


def _request_hash(path: str, options: JobOptions, upload: Upload) -> str:
    canonical = json.dumps(options.model_dump(mode="json"), sort_keys=True)
    text = f"POST {path}\n{canonical}\n{upload.sha256}{upload.ending}"
    return hashlib.sha256(text.encode()).hexdigest()
