"""What a completion used and saved: counted here, and told in its `usage`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Tally", "tokens_saved"]

_DETAILS = "completion_tokens_details"


@dataclass(slots=True)
class Tally:
    """Tokens of one request. `reasoning` is None where nothing was counted."""

    prompt: int = 0
    completion: int = 0
    reasoning: int | None = None
    forced: str | None = None
    """Why the thinking was closed, if it was: budget or loop."""

    @property
    def total(self) -> int:
        """What counts against a limit."""
        return self.prompt + self.completion

    def read(self, usage: object) -> None:
        """Take over what the server counted; its own count of the thinking goes before ours."""
        if not isinstance(usage, dict):
            return
        self.prompt = _count(usage.get("prompt_tokens"), self.prompt)
        self.completion = _count(usage.get("completion_tokens"), self.completion)
        details = usage.get(_DETAILS)
        if isinstance(details, dict):
            self.reasoning = _count(details.get("reasoning_tokens"), self.reasoning)

    def share(self, thought: int, written: int) -> None:
        """Estimate the thinking from its share of what was written, unless it was counted."""
        if self.reasoning is None and written:
            self.reasoning = round(self.completion * thought / written)

    def told(self, usage: dict[str, Any], baseline: float | None) -> dict[str, Any]:
        """The server's usage with these numbers."""
        told = {
            **usage,
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.total,
        }
        if self.reasoning is not None:
            told[_DETAILS] = {**(usage.get(_DETAILS) or {}), "reasoning_tokens": self.reasoning}
        if baseline is not None:
            told["asap_tokens_saved"] = tokens_saved(baseline, self.completion)
        return told


def tokens_saved(baseline: float, completion: int) -> int:
    """Below the baseline's mean; negative for a completion that is longer."""
    return round(baseline - completion)


def _count(value: object, otherwise: Any) -> Any:
    return value if type(value) is int and value >= 0 else otherwise
