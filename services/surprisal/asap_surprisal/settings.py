"""Settings of the surprisal role: which model scores, where, in batches of what size."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from asap_runtime.settings import Group, RuntimeSettings

__all__ = ["ScorerSettings", "SurprisalSettings"]


class ScorerSettings(Group):
    """The scorer."""

    model: str = "demo"
    """Hub name, directory, or the shipped demo scorer."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_batch_tokens: int = Field(8192, ge=16)
    """Also the longest text of POST /score; twice as many may wait."""
    concurrency: int = Field(64, ge=1)
    """Records that wait for a batch at the same time."""
    max_body_bytes: int = Field(8 * 2**20, ge=1024)
    """Largest body of POST /score."""
    max_requests: int = Field(64, ge=1)
    """Texts in one body of POST /score."""


class SurprisalSettings(RuntimeSettings):
    """The surprisal role's settings."""

    surprisal: ScorerSettings = ScorerSettings()
