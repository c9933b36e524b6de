"""What the core asks of the world: a chat model and a scorer. Adapters live with the services."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from asap.config import ScoreName
from asap.types import StepScores, Usage

__all__ = [
    "ChatModel",
    "ChatResult",
    "Sampling",
    "ScoreRequest",
    "ScoreSession",
    "Scorer",
    "TokenCounter",
]


@dataclass(frozen=True, slots=True)
class Sampling:
    """Decoding parameters of one call. `seed` differs between attempts, so each is a fresh
    sample.
    """

    temperature: float
    max_tokens: int
    seed: int
    top_p: float = 1.0
    json_schema: dict[str, Any] | None = None
    """Structured reply wanted; a server that does not support it gets a plain request."""


@dataclass(frozen=True, slots=True)
class ChatResult:
    """One reply. `finish_reason` is the server's word; "length" means truncated."""

    text: str
    finish_reason: str
    usage: Usage


class ChatModel(Protocol):
    """An LLM that answers one user message."""

    @property
    def name(self) -> str:
        """The model's name, for provenance and cache keys."""

    async def complete(self, prompt: str, sampling: Sampling) -> ChatResult:
        """One reply. Raises UpstreamError or a subclass once transport retries are used up."""


class TokenCounter(Protocol):
    """A tokenizer that counts."""

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer wherever a count is shown."""

    def count(self, text: str) -> int:
        """Number of ids of `text`, special tokens not included."""


class ScoreSession:
    """Ties the requests of one CoT's rounds together; compared by identity.

    As long as it lives, a scorer may keep what it knows of the last round, so that the next one
    costs only what changed. The scores do not depend on it.
    """


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """One CoT to score: its question, its steps in order, and which scores are wanted.

    No `scores` means that token counts are enough and no forward pass is made.
    """

    question: str
    steps: tuple[str, ...]
    scores: tuple[ScoreName, ...]
    context: Literal["raw", "chat"] = "raw"
    session: ScoreSession | None = field(default=None, compare=False, repr=False)


class Scorer(TokenCounter, Protocol):
    """A causal LM that gives each step of a CoT its scores."""

    @property
    def name(self) -> str:
        """Model name or directory, for provenance."""

    async def score(self, requests: Sequence[ScoreRequest]) -> list[StepScores]:
        """Scores for each request, in order. Raises CapacityError when one sequence does not
        fit.
        """
