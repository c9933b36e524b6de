"""Settings of the gateway role."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from asap_runtime.settings import Group, RuntimeSettings

__all__ = ["GatewayLimits", "GatewaySettings"]


class GatewayLimits(Group):
    """Where the door listens and what it lets in."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    max_body_bytes: int = Field(8 * 2**20, ge=1024)
    """Largest JSON body; uploads are streamed and have a limit of their own."""
    max_upload_bytes: int = Field(2 * 2**30, ge=1024)
    max_inline_triples: int = Field(10_000, ge=1)
    max_backlog: int = Field(5_000_000, ge=1)
    """Open items in the whole system beyond which submissions are refused."""
    max_waits: int = Field(512, ge=0)
    """Concurrent waits of POST /prune in this process; beyond it the answer is 202 at once."""
    default_config: dict[str, Any] = Field(default_factory=dict)
    """Values for a prune configuration that a request does not give."""


class GatewaySettings(RuntimeSettings):
    """The gateway role's settings."""

    gateway: GatewayLimits = GatewayLimits()
