"""What an experiment is: the pruning configuration and its presets. Travels with the data, never
read from the environment.

`default` has the paper's semantics with the defects of its scripts repaired; `paper` is what the
paper states; `repo` has the values of the authors' public scripts, for comparison only (their
by-value removal of duplicates, off-by-one first tokens and bf16 log-softmax are not reproduced).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from asap.steps import Split

__all__ = ["PRESETS", "Preset", "PruneConfig", "ScoreName"]

Preset = Literal["default", "paper", "repo"]
ScoreName = Literal[
    "first_token_surprisal", "first_token_entropy", "mean_surprisal", "step_entropy"
]
Share = Annotated[float, Field(ge=0, le=1)]


class PruneConfig(BaseModel):
    """Every knob of a pruning run. "§" cites the paper; what has no citation is ours."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    preset: Preset = "default"
    method: str = "asap"
    """A row of `asap.methods.METHODS`."""
    seed: int = Field(0, ge=0)
    split: Split = "safe"
    """`paper` loses indentation and cuts fenced code (§3.3); `code` keeps unfenced code whole."""

    # Stage 1: anchor-guided pruning (§3.2)
    anchor: Literal["llm", "extractive"] = "llm"
    """`extractive` needs no LLM and is not from the paper."""
    protocol: Literal["rewrite", "select"] = "rewrite"
    """`rewrite`: the LLM returns the compressed thinking (§3.2). `select`: it returns step
    numbers.
    """
    wording: Literal["paper", "repo"] = "paper"
    answer_code: Literal["last", "first"] = "last"
    """Which fenced Python block of the answer stands for it in the prompt."""
    require_code: bool = False
    """Reject triples whose answer holds no Python block, instead of showing the whole answer."""
    fence_safety: bool = True
    """Fence inserted text with one backtick more than it contains."""
    direct_temperature: float = Field(0.0, ge=0)  # §4.1
    rewrite_temperature: float = Field(2.0, ge=0)  # §4.1: "high-temperature sampling"
    rewrite_ladder: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """Temperatures of the second and later rewrite attempts, the last for all that follow; empty:
    `rewrite_temperature` for every attempt (§3.2).
    """
    select_temperature: float = Field(0.6, ge=0)
    max_reply_tokens: int = Field(16384, ge=1)
    context_tokens: int | None = Field(None, ge=2048)
    """The LLM's context: replies are bounded by what the prompt leaves of it, and `select` shows a
    CoT that does not fit in overlapping windows.
    """
    protect_code: bool = False
    """Steps with fenced or unfenced code stay in stage 1. Without effect on text of the LLM."""
    match: Literal["align", "paper"] = "align"
    """How a rewritten reply is proved: in-order word alignment (ours), or Algorithm 1."""
    tau: Share = 0.6  # §4.1, Algorithm 1
    autojunk: bool = False
    """difflib's heuristic; it rejects long faithful steps at random."""
    containment: Share = 0.9
    """Algorithm 1: least share of each reply step that stands in its source step."""
    fidelity: Share = 0.95
    """Alignment: least share of the reply's words that stand in the source, in order."""
    step_share: Share = 0.5
    """Alignment: a source step is kept when the reply keeps this share of its words."""
    min_keep: Share = 0.02
    """Least share of the CoT's words that a valid reply keeps."""
    project: Literal["origin_steps", "llm_text"] = "origin_steps"
    """Emit the matched source steps word for word, or the LLM's text (§3.2)."""
    max_attempts: int = Field(5, ge=1)
    on_fail: Literal["original", "drop"] = "original"
    extractive_keep: Share = 0.5
    """Extractive anchor: share of the CoT's words to keep."""

    # Stage 2: first-token surprisal (§3.3, Algorithm 2)
    max_tokens: int | None = Field(None, ge=1)
    """The budget L_max in tokens of the scorer's tokenizer; 4096 when no target is given (§4.1)."""
    keep_ratio: float | None = Field(None, gt=0, le=1)
    """Instead of `max_tokens`: share of the original CoT's tokens to keep."""
    step_ratio: float | None = Field(None, gt=0, le=1)
    """Instead of `max_tokens`: share of the steps to keep."""
    score: ScoreName = "first_token_surprisal"
    context: Literal["raw", "chat"] = "raw"
    mode: Literal["global", "iterative"] = "global"
    """`global` scores once (Algorithm 2); `iterative` re-scores what is left after each round."""
    rescore_every: int = Field(1, ge=1)
    min_steps: int = Field(1, ge=0)
    refill: bool = False
    """Put removed steps back, most surprising first, where they still fit."""
    protect_first: int = Field(0, ge=0)
    protect_last: int = Field(0, ge=0)
    count_bos: bool = False
    all_scores: bool = False
    """Keep all four scores, so that any rule can choose later without a model. Else the two of the
    first token, from one row of the output head for each step; means need every token's row, which
    takes a small model with a large vocabulary several times as long.
    """
    score_within_budget: bool = True
    """Score CoTs that fit already, so that any later budget needs no model."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        merged = {**PRESETS.get(str(values.get("preset", "default")), {}), **values}
        given = {
            name
            for name in ("max_tokens", "keep_ratio", "step_ratio")
            if values.get(name) is not None
        }
        if given - {"max_tokens"}:
            merged = {**merged, "max_tokens": values.get("max_tokens")}
        elif merged.get("max_tokens") is None:
            merged["max_tokens"] = 4096
        return merged

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if sum(t is not None for t in (self.max_tokens, self.keep_ratio, self.step_ratio)) != 1:
            raise ValueError("give exactly one of max_tokens, keep_ratio and step_ratio")
        return self

    @model_validator(mode="after")
    def _refill_has_room(self) -> Self:
        if self.refill and (self.mode == "iterative" or self.step_ratio is not None):
            raise ValueError("refill needs mode 'global' and max_tokens or keep_ratio")
        return self

    def hash(self) -> str:
        """SHA-256 over the canonical JSON of all values."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()


_FAITHFUL: dict[str, Any] = {
    "split": "paper",
    "match": "paper",
    "autojunk": True,
    "containment": 0.0,
    "min_keep": 0.0,
    "project": "llm_text",
    "fence_safety": False,
    "require_code": True,
    "min_steps": 0,
    "score_within_budget": False,
}
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {**_FAITHFUL, "max_tokens": 4096},
    "repo": {
        **_FAITHFUL,
        "wording": "repo",
        "answer_code": "first",
        "max_attempts": 1,
        "on_fail": "drop",
        "count_bos": True,
        "max_tokens": 1024,
    },
}
"""What each preset changes against the defaults above; explicit values win over the preset."""
