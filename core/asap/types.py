"""The values that travel: Triple, Record and its blocks. Frozen, strict, JSON both ways.

A Record only grows: stage 1 adds `coarse`, stage 2 adds `fine`. Both hold decisions (indices of
kept steps), scores and counts, so that the pruned CoT, and a CoT for any other budget, follow from
the record alone without a model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, computed_field, model_validator

from asap.config import PruneConfig, ScoreName
from asap.errors import InvalidInput
from asap.steps import join_steps, split_steps
from asap.thinking import check_control_tokens

__all__ = [
    "Attempt",
    "CoarseBlock",
    "FineBlock",
    "MatchReport",
    "Record",
    "Status",
    "StepScores",
    "TokenCounts",
    "Triple",
    "Usage",
]

Status = Literal["unchanged", "compressed", "fallback_original", "rejected"]


class Frozen(BaseModel):
    """Base of all values: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Triple(Frozen):
    """(question, CoT, answer). Question and answer are never changed by any method."""

    id: str = ""
    """Given, or the SHA-256 of question, CoT and answer."""
    question: str
    cot: str
    answer: str
    meta: dict[str, JsonValue] = Field(default_factory=dict)
    """Other fields of the source line, carried through untouched."""

    @model_validator(mode="before")
    @classmethod
    def _default_id(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("id", "") == "":
            content = [values.get(name) for name in ("question", "cot", "answer")]
            digest = hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()
            return {**values, "id": digest}
        return values

    def check(self) -> None:
        """Refuse text that no tokenizer or file can take.

        Raises InvalidInput: `control-token-in-text` for a chat control token, `invalid-utf8` for
        half a surrogate pair, which JSON can spell and UTF-8 cannot.
        """
        for field in ("id", "question", "cot", "answer"):
            text = getattr(self, field)
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InvalidInput(
                    f"field {field!r} holds half a surrogate pair at character {error.start}",
                    code="invalid-utf8",
                    field=field,
                ) from None
            if field != "id":
                check_control_tokens(field, text)


class Usage(Frozen):
    """What LLM calls used. `cost_usd` is None when the price is not known."""

    calls: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Those of `prompt_tokens` that the server had in its prefix cache."""
    completion_tokens: int = 0
    cost_usd: float | None = None

    def __add__(self, other: Usage) -> Usage:
        costs = [cost for cost in (self.cost_usd, other.cost_usd) if cost is not None]
        return Usage(
            calls=self.calls + other.calls,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            cost_usd=sum(costs) if costs else None,
        )


class MatchReport(Frozen):
    """Proof, or refusal, that a reply stands in the source in order. An expected outcome, not an
    error.
    """

    match: Literal["align", "paper", "exact"]
    """`exact`: the kept steps themselves, valid by construction and checked."""
    valid: bool
    reason: str | None = None
    kept: tuple[int, ...] = ()
    """Indices of the matched source steps, strictly increasing."""
    similarity: float | None = None
    """`paper`: the lowest Gestalt ratio among the matched pairs; of a reply that failed, the best
    ratio of the step that matched none. `align`: of a reply that failed, the share of the named
    paragraph's words that stand in the source.
    """
    containment: float | None = None
    """`paper`: the lowest share of a reply step that stands in its source step."""
    fidelity: float | None = None
    """`align`: share of the reply's words aligned with the source."""


class Attempt(Frozen):
    """One reply of stage 1: what was asked for, what came of it, what it cost."""

    purpose: Literal["direct", "coarse"]
    number: int
    outcome: Literal["accepted", "empty", "truncated", "unparsable", "invalid"]
    report: MatchReport | None = None
    reply_chars: int
    usage: Usage


class CoarseBlock(Frozen):
    """Stage 1's result."""

    protocol: Literal["rewrite", "select", "extractive", "direct"]
    model: str
    direct_cot: str | None = None
    kept: tuple[int, ...] | None = None
    """Kept source steps; None when the result is text of the LLM or the stage fell back."""
    text: str | None = None
    """The LLM's own text (`project=llm_text`, method `direct`)."""
    status: Literal["accepted", "fallback_original", "rejected"]
    attempts: tuple[Attempt, ...] = ()
    flags: tuple[str, ...] = ()
    prompt_sha256: str | None = None

    @property
    def usage(self) -> Usage:
        """Sum over all attempts."""
        return sum((attempt.usage for attempt in self.attempts), Usage())


class StepScores(Frozen):
    """What the scorer says of one CoT. Scores are in nats, one per step; None: no score, keep the
    step.
    """

    scores: dict[ScoreName, tuple[float | None, ...]] = Field(default_factory=dict)
    tokens: tuple[int, ...]
    """n(step) for each step."""
    tokens_joined: tuple[int, ...]
    """n(step + blank line) for each step: what it costs when another follows."""
    total: int
    """n(CoT), one real tokenisation."""
    bos: int = 0
    """1 when the tokenizer defines a BOS token."""
    flags: tuple[str, ...] = ()


class FineBlock(Frozen):
    """Stage 2's result: which steps stay, why, and what any other budget would need."""

    method: str
    scorer: str
    tokenizer: str
    max_tokens: int | None
    """The resolved budget; None for a step ratio."""
    kept: tuple[int, ...]
    """Indices into the steps that stage 2 was given."""
    removed: tuple[int, ...]
    """Indices in the order of removal."""
    scored: StepScores
    scored_budget: int | None = None
    """`iterative`: the lowest budget that `removed` and the scores can serve."""
    flags: tuple[str, ...] = ()


class TokenCounts(Frozen):
    """Tokens of the CoT at each stage, in the named tokenizer."""

    tokenizer: str
    original: int
    coarse: int
    pruned: int


_COMPUTED = ("id", "status", "pruned_cot", "kept_steps", "flags")


class Record(Frozen):
    """A triple on its way: source, config and one block per stage. The JSON line of `asap
    prune`.
    """

    version: Literal[1] = 1
    triple: Triple
    config: PruneConfig
    coarse: CoarseBlock | None = None
    fine: FineBlock | None = None
    tokens: TokenCounts | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_computed(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            return {key: value for key, value in values.items() if key not in _COMPUTED}
        return values

    def with_coarse(self, block: CoarseBlock) -> Self:
        """A copy that holds stage 1's block."""
        return self._with(coarse=block)

    def with_fine(self, block: FineBlock) -> Self:
        """A copy that holds stage 2's block."""
        return self._with(fine=block)

    def with_tokens(self, counts: TokenCounts) -> Self:
        """A copy that holds the token counts."""
        return self._with(tokens=counts)

    def _with(self, **blocks: Frozen) -> Self:
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self).model_validate({**fields, **blocks})

    @cached_property
    def source_steps(self) -> tuple[str, ...]:
        """The steps of the original CoT."""
        return tuple(split_steps(self.triple.cot, self.config.split))

    @property
    def coarse_kept(self) -> Sequence[int]:
        """Indices of the source steps that stage 1 kept; all of them when it did not choose."""
        if self.coarse is not None and self.coarse.kept is not None:
            return self.coarse.kept
        return range(len(self.source_steps))

    @cached_property
    def coarse_steps(self) -> tuple[str, ...]:
        """The steps that stage 2 works on."""
        if self.coarse is not None and self.coarse.text is not None:
            return tuple(split_steps(self.coarse.text, self.config.split))
        return tuple(self.source_steps[i] for i in self.coarse_kept)

    @cached_property
    def coarse_cot(self) -> str:
        """C_coarse; the original byte for byte when stage 1 removed nothing."""
        if self.coarse is not None and self.coarse.text is not None:
            return self.coarse.text
        if len(self.coarse_steps) == len(self.source_steps):
            return self.triple.cot
        return join_steps(self.coarse_steps)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def id(self) -> str:
        """The triple's id."""
        return self.triple.id

    @computed_field  # type: ignore[prop-decorator]
    @cached_property
    def status(self) -> Status:
        """Rejected, fallen back to the original in stage 1, unchanged, or compressed."""
        if self.coarse is not None and self.coarse.status != "accepted":
            return self.coarse.status
        return "unchanged" if self.pruned_cot == self.triple.cot else "compressed"

    @computed_field  # type: ignore[prop-decorator]
    @cached_property
    def pruned_cot(self) -> str:
        """C', the result so far; the input of each stage byte for byte when it removed nothing."""
        if self.fine is None or len(self.fine.kept) == len(self.coarse_steps):
            return self.coarse_cot
        return join_steps([self.coarse_steps[i] for i in self.fine.kept])

    @computed_field  # type: ignore[prop-decorator]
    @cached_property
    def kept_steps(self) -> tuple[int, ...] | None:
        """Indices of the source steps in C'; None when C' is not made of source steps."""
        if self.coarse is not None and self.coarse.text is not None:
            return None
        if self.fine is None:
            return tuple(self.coarse_kept)
        return tuple(self.coarse_kept[i] for i in self.fine.kept)

    @computed_field  # type: ignore[prop-decorator]
    @cached_property
    def flags(self) -> tuple[str, ...]:
        """What a reader should know: the flags of all stages, in order, each once."""
        flags = ["empty_cot"] if not self.triple.cot.strip() else []
        for block in (self.coarse, self.fine):
            flags += block.flags if block is not None else ()
        return tuple(dict.fromkeys(flags))
