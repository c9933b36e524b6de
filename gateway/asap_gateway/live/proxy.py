"""/v1: models that are served live, behind the API that OpenAI's clients speak."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, ConfigDict, JsonValue
from starlette.requests import ClientDisconnect

from asap_gateway.auth import Caller
from asap_gateway.json_body import GONE, check_json
from asap_gateway.live.exchange import Exchange
from asap_gateway.live.requests import FIELDS, Kind, Thinking, read_request
from asap_gateway.live.serving import Serving, get_serving
from asap_runtime.strict_json import parse_json

__all__ = ["router"]

STARTED_AT = int(time.time())


class LiveErrorBody(BaseModel):
    """What went wrong; `param` names the field, `code` is the problem's."""

    message: str
    type: str
    param: str | None
    code: str


class LiveError(BaseModel):
    """An error in the shape of OpenAI's API."""

    error: LiveErrorBody


class LiveModel(BaseModel):
    """A model that can be asked; `max_model_len` counts the tokens of prompt and completion."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "asap"
    max_model_len: int | None


class LiveModels(BaseModel):
    """All models that can be asked."""

    object: str = "list"
    data: list[LiveModel]


class Completion(BaseModel):
    """What the model server answers, with `usage.completion_tokens_details.reasoning_tokens`."""

    model_config = ConfigDict(extra="allow")

    choices: list[dict[str, JsonValue]]


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": title, "model": LiveError}
    for status, title in {
        400: "A field is unknown or wrong; `param` names it",
        401: "No live API key",
        403: "The key's role does not allow it",
        404: "No such model, or not yours",
        413: "Too large",
        415: "Not application/json, or compressed in transfer",
        429: "Too many requests, streams or tokens; or all servers are busy",
        500: "An error of ours",
        502: "The model server's answer cannot be used",
        503: "No server of the model can be reached; try again",
        504: "The model server did not answer in time",
    }.items()
}
router = APIRouter(prefix="/v1", tags=["live"], responses=_ERRORS)
TheServing = Annotated[Serving, Depends(get_serving)]


def _body(kind: Kind, required: str, schema: dict[str, Any]) -> dict[str, Any]:
    """The description of a request: its fields, of which few are ours to describe."""
    fields: dict[str, Any] = {name: {} for name in sorted(FIELDS[kind])}
    fields |= {
        "model": {"type": "string", "minLength": 1, "maxLength": 200},
        "stream": {"type": ["boolean", "null"]},
        "thinking": Thinking.model_json_schema() | {"description": Thinking.__doc__},
        required: schema,
    }
    described = {
        "type": "object",
        "properties": fields,
        "required": ["model", required],
        "additionalProperties": False,
    }
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": described}}}
    }


@router.get("/models")
async def list_live_models(caller: Caller, serving: TheServing) -> LiveModels:
    """The models that are served at the moment."""
    names = serving.upstreams.models(caller.tenant)
    return LiveModels(data=[_model(serving, caller.tenant, name) for name in names])


@router.get("/models/{name}")
async def get_live_model(name: str, caller: Caller, serving: TheServing) -> LiveModel:
    """One of them."""
    return _model(serving, caller.tenant, name)


@router.post(
    "/chat/completions",
    response_model=Completion,
    openapi_extra=_body(
        "chat/completions",
        "messages",
        {"type": "array", "minItems": 1, "items": {"type": "object"}},
    ),
)
async def chat_completions(request: Request, caller: Caller, serving: TheServing) -> Response:
    """A chat completion, whole or (`stream`) as server-sent events.

    `thinking` bounds the thinking and shows it apart from the answer; without it a stream comes as
    the model server sends it.
    """
    return await _complete("chat/completions", request, caller.tenant, serving)


@router.post(
    "/completions",
    response_model=Completion,
    openapi_extra=_body("completions", "prompt", {"type": ["string", "array"]}),
)
async def completions(request: Request, caller: Caller, serving: TheServing) -> Response:
    """A completion of a text that the caller has rendered, whole or as server-sent events."""
    return await _complete("completions", request, caller.tenant, serving)


async def _complete(kind: Kind, request: Request, tenant: str, serving: Serving) -> Response:
    try:
        raw = await request.body()
    except ClientDisconnect:
        return Response(status_code=GONE)
    check_json(request)
    asked = read_request(kind, parse_json(raw))
    return Exchange(serving, serving.upstreams.find(tenant, asked.model), asked)


def _model(serving: Serving, tenant: str, name: str) -> LiveModel:
    context = serving.upstreams.find(tenant, name).context
    return LiveModel(id=name, created=STARTED_AT, max_model_len=context)
