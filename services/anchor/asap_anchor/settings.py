"""Settings of the anchor role: which LLM server, how hard it may be asked."""

from __future__ import annotations

from pydantic import Field, SecretStr

from asap.estimate import Prices
from asap_runtime.settings import Group, RuntimeSettings

__all__ = ["AnchorSettings", "LLMSettings"]


class LLMSettings(Group):
    """An OpenAI-compatible server. Without a model the extractive anchor is all there is."""

    base_url: str | None = None
    """With /v1; default: OpenAI's own."""
    model: str | None = None
    api_key: SecretStr = SecretStr("none")
    concurrency: int = Field(32, ge=1)
    """Most calls at once; fewer while the server refuses calls or becomes slow."""
    requests_per_minute: float | None = Field(None, gt=0)
    tokens_per_minute: float | None = Field(None, gt=0)
    """Prompt and reply together."""
    timeout_s: float = Field(600.0, gt=0)
    """One request, until the last byte of its reply."""
    hedge_after_s: float | None = Field(None, gt=0)
    """A request that takes longer is sent a second time, and the first answer counts; both may be
    billed. A good value is the 95th percentile of `asap_llm_seconds`; default: never."""
    item_timeout_s: float = Field(1500.0, gt=0)
    """All calls of one item, retries and waits included; then it is tried again later."""
    price_in: float | None = Field(None, ge=0)
    """US dollars per million prompt tokens."""
    price_cached: float | None = Field(None, ge=0)
    """… of those that the server had in its prefix cache; default: like the others."""
    price_out: float | None = Field(None, ge=0)
    """US dollars per million completion tokens."""
    price_batch_share: float = Field(0.5, ge=0, le=1)
    """A batch's part of these prices."""
    batch: bool = False
    """Send calls as batches of the provider: cheaper, and the replies come within a day."""
    batch_period_s: float = Field(60.0, gt=0)
    """How often collected calls are sent as one batch, and open batches are asked for."""

    @property
    def prices(self) -> Prices | None:
        """What calls cost, when input and output have a price."""
        if self.price_in is None or self.price_out is None:
            return None
        return Prices(self.price_in, self.price_out, self.price_cached, self.price_batch_share)

    @property
    def planned_prices(self) -> Prices | None:
        """What a call will cost the way that calls are sent, for estimates."""
        prices = self.prices
        return prices.of_batches() if prices is not None and self.batch else prices


class AnchorSettings(RuntimeSettings):
    """The anchor role's settings."""

    llm: LLMSettings = LLMSettings()
