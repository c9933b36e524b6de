"""Who calls: the tenant whose objects a request may see, and what its role lets it do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

__all__ = ["LOCAL", "Caller", "Principal", "get_principal"]


@dataclass(frozen=True, slots=True)
class Principal:
    """The holder of a key, or of no key on a server of this machine alone."""

    tenant: str
    key_id: str


LOCAL = Principal(tenant="local", key_id="local")
"""Everybody on a server without keys."""


def get_principal(request: Request) -> Principal:
    """The caller of this request."""
    return LOCAL


Caller = Annotated[Principal, Depends(get_principal)]
