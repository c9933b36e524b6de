"""Settings of the anchor role: which LLM server, how hard it may be asked."""

from __future__ import annotations

from pydantic import Field, SecretStr

from asap_runtime.settings import Group, RuntimeSettings

__all__ = ["AnchorSettings", "LLMSettings"]


class LLMSettings(Group):
    """An OpenAI-compatible server. Without a model the extractive anchor is all there is."""

    base_url: str | None = None
    """With /v1; default: OpenAI's own."""
    model: str | None = None
    api_key: SecretStr = SecretStr("none")
    concurrency: int = Field(32, ge=1)
    timeout_s: float = Field(600.0, gt=0)
    price_in: float | None = Field(None, ge=0)
    """US dollars per million prompt tokens."""
    price_out: float | None = Field(None, ge=0)
    """US dollars per million completion tokens."""


class AnchorSettings(RuntimeSettings):
    """The anchor role's settings."""

    llm: LLMSettings = LLMSettings()
