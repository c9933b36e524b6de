"""/models: the registry of trained models, and which of their versions is in production."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Response
from pydantic import BaseModel, ConfigDict, JsonValue

from asap_gateway.auth import Caller
from asap_gateway.errors import PROBLEM_RESPONSES
from asap_gateway.json_body import JsonRoute
from asap_gateway.service import Gateway, get_gateway
from asap_runtime.models import MODEL_NAME, ModelStage, ModelVersion

__all__ = ["router"]

router = APIRouter(
    prefix="/models", tags=["models"], responses=PROBLEM_RESPONSES, route_class=JsonRoute
)
TheGateway = Annotated[Gateway, Depends(get_gateway)]
Name = Annotated[str, Path(pattern=MODEL_NAME)]
Version = Annotated[int, Path(ge=1, le=2**31 - 1)]


class ModelBody(BaseModel):
    """A version of a trained model. `created_at` is in seconds since the epoch."""

    model_config = ConfigDict(extra="forbid")

    name: str
    version: int
    stage: ModelStage
    base: str
    """What its training started from."""
    job_id: str
    """Of the training; the job may have been deleted since."""
    manifest_sha256: str
    """Of the list of its files with their hashes."""
    created_at: float
    meta: dict[str, JsonValue]
    """Figures of its training and of evaluations."""

    @classmethod
    def of(cls, model: ModelVersion) -> ModelBody:
        """The body of a version."""
        return cls(
            name=model.name,
            version=model.version,
            stage=model.stage,
            base=model.base,
            job_id=model.job_id,
            manifest_sha256=model.manifest_sha256,
            created_at=model.created_at / 1e6,
            meta=dict(model.meta),
        )


class ModelPage(BaseModel):
    """Versions by name, the newest of each first."""

    models: list[ModelBody]
    next_cursor: str | None


class StageRequest(BaseModel):
    """Where a version is to stand."""

    model_config = ConfigDict(extra="forbid")

    stage: ModelStage


@router.get("", response_model=ModelPage)
async def list_models(
    caller: Caller,
    gateway: TheGateway,
    name: Annotated[str | None, Query(pattern=MODEL_NAME)] = None,
    cursor: Annotated[
        str | None,
        Query(
            pattern=r"^[a-z0-9][a-z0-9._-]{0,62}@[1-9][0-9]{0,8}$",
            description="`next_cursor` of the page before",
        ),
    ] = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
) -> ModelPage:
    """All versions, or those of one name: by name, the newest of each first."""
    found = await asyncio.to_thread(
        gateway.models.list, caller.tenant, name=name, cursor=cursor, limit=limit
    )
    following = found[-1].reference if len(found) == limit else None
    return ModelPage(models=[ModelBody.of(model) for model in found], next_cursor=following)


@router.get("/{name}", response_model=ModelBody)
async def get_model(name: Name, caller: Caller, gateway: TheGateway) -> ModelBody:
    """What the name stands for: its version in production, else the newest."""
    return ModelBody.of(await asyncio.to_thread(gateway.models.get, caller.tenant, name))


@router.get("/{name}/{version}", response_model=ModelBody)
async def get_model_version(
    name: Name, version: Version, caller: Caller, gateway: TheGateway
) -> ModelBody:
    """One version."""
    return ModelBody.of(await asyncio.to_thread(gateway.models.get, caller.tenant, name, version))


@router.post("/{name}/{version}/stage", response_model=ModelBody)
async def move_model(
    body: StageRequest, name: Name, version: Version, caller: Caller, gateway: TheGateway
) -> ModelBody:
    """Move a version. In production it takes the place of the one that was there."""
    moved = await asyncio.to_thread(
        gateway.models.set_stage, caller.tenant, name, version, body.stage
    )
    return ModelBody.of(moved)


@router.delete("/{name}/{version}", status_code=204)
async def delete_model(
    name: Name, version: Version, caller: Caller, gateway: TheGateway
) -> Response:
    """Delete a version with its files; 409 while it is in production."""
    await asyncio.to_thread(gateway.delete_model, caller.tenant, name, version)
    return Response(status_code=204)
