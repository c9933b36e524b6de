"""Settings of the gateway role."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from asap_gateway.live.settings import ServingSettings
from asap_runtime.ingest import IntakeLimits
from asap_runtime.json_lines import ReadLimits
from asap_runtime.pepper import AuthSettings
from asap_runtime.settings import Group, RuntimeSettings
from asap_runtime.webhooks import WebhookSettings

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
    max_open_items_per_tenant: int = Field(2_000_000, ge=1)
    max_job_items: int = Field(1_000_000, ge=1)
    """Lines of an uploaded file or a data set."""
    max_bad_lines: int = Field(10_000, ge=0)
    max_bad_share: float = Field(0.1, ge=0, le=1)
    """Of a file's lines; beyond either the job is rejected."""
    max_line_bytes: int = Field(4 * 2**20, ge=1024)
    max_expanded_ratio: float = Field(20.0, ge=1)
    """Of a compressed file; the first 64 MiB are free."""
    max_expanded_bytes: int = Field(4 * 2**30, ge=1024)
    max_waits: int = Field(512, ge=0)
    """Concurrent waits of POST /prune in this process; beyond it the answer is 202 at once."""
    retention_days: float = Field(30.0, gt=0)
    """How long a finished job is kept."""
    requests_per_s: float = Field(20.0, gt=0)
    """Of one key, in this process; there is no limit where there are no keys."""
    request_burst: int = Field(60, ge=1)
    default_config: dict[str, Any] = Field(default_factory=dict)
    """Values for a prune configuration that a request does not give."""

    def intake(self) -> IntakeLimits:
        """What a file may hold."""
        read = ReadLimits(self.max_line_bytes, self.max_expanded_ratio, self.max_expanded_bytes)
        return IntakeLimits(read, self.max_job_items, self.max_bad_lines, self.max_bad_share)


class GatewaySettings(RuntimeSettings):
    """The gateway role's settings."""

    gateway: GatewayLimits = GatewayLimits()
    auth: AuthSettings = AuthSettings()
    webhooks: WebhookSettings = WebhookSettings()
    serving: ServingSettings = ServingSettings()
