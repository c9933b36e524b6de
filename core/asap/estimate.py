"""What a run will take, before it starts: tokens, LLM calls and money, scored tokens. And what it
saved.

The shares below were measured on 16 recorded replies of a large model to the prompts of stage 1;
they make an estimate, not a promise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass, field

from asap.config import PruneConfig
from asap.methods import get_method
from asap.ports import TokenCounter
from asap.types import Record, Usage

__all__ = ["Estimate", "Prices", "RoughCounter", "Summary", "estimate", "uses_llm"]

DIRECT_PROMPT, COARSE_PROMPT = 80, 260
"""Tokens of the prompt templates themselves."""
DIRECT_REPLY = 600
"""Mean tokens of a direct CoT."""
REWRITE_SHARE = 0.49
"""Rewritten thinking, as a share of the CoT's characters."""
SELECT_TOKENS_PER_STEP = 1.4
"""Reply of `select` per numbered step: about half of the steps are kept, three tokens each."""


class RoughCounter:
    """Tokens where there is no tokenizer: characters divided by a mean; its name says so."""

    def __init__(self, characters_per_token: float = 3.5) -> None:
        self._characters_per_token = characters_per_token

    @property
    def tokenizer_name(self) -> str:
        """No tokenizer, but the rule."""
        return f"characters/{self._characters_per_token:.3g}"

    def count(self, text: str) -> int:
        """About so many tokens."""
        return math.ceil(len(text) / self._characters_per_token)


@dataclass(frozen=True, slots=True)
class Prices:
    """What an LLM server charges, in US dollars per million tokens."""

    price_in: float
    price_out: float
    price_cached: float | None = None
    """Prompt tokens found in the server's prefix cache; None: like the others."""
    batch_share: float = 0.5
    """A batch's part of these prices."""

    def usd(
        self, prompt_tokens: int, completion_tokens: int, *, cached: int = 0, batch: bool = False
    ) -> float:
        """US dollars; `cached` of the prompt's tokens were in the prefix cache."""
        price_cached = self.price_in if self.price_cached is None else self.price_cached
        paid = (
            (prompt_tokens - cached) * self.price_in
            + cached * price_cached
            + completion_tokens * self.price_out
        )
        return paid * (self.batch_share if batch else 1.0) / 1e6

    def of_batches(self) -> Prices:
        """What calls cost that go as batches."""
        share, cached = self.batch_share, self.price_cached
        return Prices(
            self.price_in * share,
            self.price_out * share,
            None if cached is None else cached * share,
            batch_share=1.0,
        )


@dataclass(frozen=True, slots=True)
class Estimate:
    """Planned work; money only when prices are known."""

    records: int = 0
    cot_tokens: int = 0
    llm_calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    scored_tokens: int = 0

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def cost_usd(self, price_in: float, price_out: float) -> float:
        """US dollars at prices per million tokens."""
        return Prices(price_in, price_out).usd(self.prompt_tokens, self.completion_tokens)


def uses_llm(config: PruneConfig) -> bool:
    """Whether a run with this configuration asks an LLM, which is all that costs money."""
    return "anchor" in get_method(config.method).stages and config.anchor == "llm"


def estimate(records: Iterable[Record], config: PruneConfig, counter: TokenCounter) -> Estimate:
    """Add up the work of each record; one tokenisation of its texts, no call and no forward
    pass.
    """
    stages = get_method(config.method).stages
    asks_llm = uses_llm(config)
    number = cot_tokens = calls = prompt = completion = scored = 0
    for record in records:
        question, cot, answer = (
            counter.count(text)
            for text in (record.triple.question, record.triple.cot, record.triple.answer)
        )
        number += 1
        cot_tokens += cot
        if asks_llm:
            calls += 1
            prompt += DIRECT_PROMPT + question + answer
            completion += DIRECT_REPLY
            if config.method != "direct":
                calls += 1
                steps = len(record.source_steps)
                select = config.protocol == "select"
                prompt += COARSE_PROMPT + DIRECT_REPLY + cot + (3 * steps if select else 0)
                completion += int(steps * SELECT_TOKENS_PER_STEP if select else cot * REWRITE_SHARE)
        if "surprisal" in stages and get_method(config.method).needs_scores:
            share = 1.0
            if "anchor" in stages:
                share = REWRITE_SHARE if asks_llm else config.extractive_keep
            scored += question + int(cot * share)
    return Estimate(number, cot_tokens, calls, prompt, completion, scored)


@dataclass(slots=True)
class Summary:
    """What a run did, added up record by record."""

    statuses: dict[str, int] = field(default_factory=dict)
    flags: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    kept_steps: int = 0
    tokens: int = 0
    coarse_tokens: int = 0
    pruned_tokens: int = 0
    attempts: int = 0
    first_attempt: int = 0
    usage: Usage = field(default_factory=Usage)

    @property
    def records(self) -> int:
        """Records added so far."""
        return sum(self.statuses.values())

    @property
    def kept_ratio(self) -> float:
        """Kept part of the CoT tokens."""
        return self.pruned_tokens / self.tokens if self.tokens else 1.0

    def add(self, record: Record) -> None:
        """Count one finished record."""
        self.statuses[record.status] = self.statuses.get(record.status, 0) + 1
        for flag in record.flags:
            self.flags[flag] = self.flags.get(flag, 0) + 1
        self.steps += len(record.source_steps)
        if record.kept_steps is not None:
            self.kept_steps += len(record.kept_steps)
        else:
            self.kept_steps += len(record.fine.kept if record.fine else record.coarse_steps)
        if record.tokens is not None:
            self.tokens += record.tokens.original
            self.coarse_tokens += record.tokens.coarse
            self.pruned_tokens += record.tokens.pruned
        if record.coarse is not None:
            tries = [attempt for attempt in record.coarse.attempts if attempt.purpose == "coarse"]
            self.attempts += len(tries)
            self.first_attempt += bool(tries) and tries[0].outcome == "accepted"
            self.usage += record.coarse.usage
