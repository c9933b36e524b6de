"""What an item of a job may be, and the route of stages that it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Tag, TypeAdapter

from asap.eval_items import EvalItem
from asap.methods import get_method
from asap.runs import TrainRun
from asap.types import Record

__all__ = ["Payload", "read_payload", "route_of"]

Payload = Record | TrainRun | EvalItem
"""Told apart by `kind`; a record has none."""

PRUNE = "prune"


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return str(value.get("kind", PRUNE))
    return str(getattr(value, "kind", PRUNE))


_PAYLOADS: TypeAdapter[Payload] = TypeAdapter(
    Annotated[
        Annotated[Record, Tag(PRUNE)]
        | Annotated[TrainRun, Tag("train")]
        | Annotated[EvalItem, Tag("evaluate")],
        Discriminator(_kind),
    ]
)


def read_payload(stored: bytes) -> Payload:
    """The payload of its UTF-8 JSON. Raises ValidationError for what is none."""
    return _PAYLOADS.validate_json(stored)


def route_of(payload: Payload) -> tuple[str, ...]:
    """The stages that the payload visits, in order; none for a method that changes nothing."""
    if isinstance(payload, TrainRun):
        return ("trainer",)
    if isinstance(payload, EvalItem):
        return ("generate", "grade")
    return get_method(payload.config.method).stages
