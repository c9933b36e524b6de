"""Settings of live serving: which models stand behind `/v1`, and the limits of what passes."""

from __future__ import annotations

from typing import Final

from pydantic import Field, SecretStr, field_validator

from asap_runtime.endpoints import check_url
from asap_runtime.settings import Group

__all__ = ["CLOSING_PHRASE", "ServingSettings", "ShadowRule"]

CLOSING_PHRASE: Final = (
    "I have thought about this for long enough, so I will give the answer based on the thinking "
    "so far."
)


class ShadowRule(Group):
    """A model that is asked the same as another, to measure what that one saves."""

    baseline: str
    share: float = Field(0.05, gt=0, le=1)
    """Of the live requests."""


class ServingSettings(Group):
    """Live serving. Figures in seconds, where nothing else is said."""

    endpoints: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Servers by model name, such as {"asap-7b": ["http://vllm-0:8000"]}, for callers of every
    tenant; besides those that `asap deploy` announces."""
    api_key: SecretStr | None = None
    """That all of these servers ask for."""
    unopened: tuple[str, ...] = ()
    """Models whose prompt does not end in `<think>`: they write the opening tag, or do not think.
    The checkpoints of this project are none of them."""
    baseline_tokens: dict[str, float] = Field(default_factory=dict)
    """By model: mean tokens of a completion of the model it was made from."""
    closing_phrase: str = Field(CLOSING_PHRASE, min_length=1, max_length=500)
    """What ends a thinking that is cut off."""
    shadow: dict[str, ShadowRule] = Field(default_factory=dict)
    """By model."""
    shadow_concurrency: int = Field(4, ge=1)
    streams_per_key: int = Field(64, ge=1)
    """Requests of one key at once, in this process."""
    tokens_per_minute: int = Field(2_000_000, ge=1)
    """Of one key, in this process, prompt and completion."""
    requests_per_endpoint: int = Field(1024, ge=1)
    """At once, in this process; what is beyond goes to another endpoint, or is refused."""
    connect_s: float = Field(2.0, gt=0)
    first_byte_s: float = Field(120.0, gt=0)
    """Of a stream."""
    gap_s: float = Field(60.0, gt=0)
    """Of a stream, between two bytes."""
    total_s: float = Field(900.0, gt=0)
    health_period_s: float = Field(3.0, gt=0)
    grace_s: float = Field(25.0, ge=0)
    """How long streams may go on once the process is asked to stop."""

    @field_validator("endpoints")
    @classmethod
    def _each_has_an_address(
        cls, endpoints: dict[str, tuple[str, ...]]
    ) -> dict[str, tuple[str, ...]]:
        for name, urls in endpoints.items():
            if not urls:
                raise ValueError(f"{name!r} has no address")
            for url in urls:
                check_url(url)
        return endpoints
