"""What a job would take, before it starts, and whether its cost cap allows that. No IO, no call.

Memory does not grow with the input. The first records are counted by the tokenizer, the others by
their characters at the mean of the first: a tokenizer would need minutes for a large file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from asap.config import PruneConfig
from asap.errors import AsapError, CostCapReached, InvalidInput
from asap.estimate import Estimate, Prices, RoughCounter, estimate, uses_llm
from asap.ports import TokenCounter
from asap.types import Record, Triple
from asap_gateway.schemas import EstimateBody, JobOptions

__all__ = ["SAMPLE", "Estimator", "check_cap", "estimate_job", "require_prices"]

SAMPLE = 1000
"""Records that the tokenizer counts."""


def estimate_job(
    lines: Iterable[Triple | AsapError],
    config: PruneConfig,
    counter: TokenCounter | None,
    prices: Prices | None,
) -> EstimateBody:
    """The estimate of a job of these lines, read once; a line that is an error is a bad one."""
    estimator = Estimator(config, counter, prices)
    for line in lines:
        estimator.add(line)
    return estimator.body()


class Estimator:
    """Adds up an estimate line by line, for whoever reads the lines anyway.

    Without a counter tokens are rough from the start; without prices there is no cost.
    """

    def __init__(
        self, config: PruneConfig, counter: TokenCounter | None, prices: Prices | None
    ) -> None:
        self._config, self._prices = config, prices
        self._sample = _Observed(counter or RoughCounter())
        self._rest: RoughCounter | None = None
        self._sum, self._bad_lines, self._sampled = Estimate(), 0, 0

    def add(self, line: Triple | AsapError) -> None:
        """Count one line."""
        if isinstance(line, AsapError):
            self._bad_lines += 1
            return
        if self._rest is None and self._sampled == SAMPLE:
            self._rest = RoughCounter(self._sample.characters_per_token)
        counter: TokenCounter = self._rest or self._sample
        record = Record(triple=line, config=self._config)
        self._sum += estimate([record], self._config, counter)
        self._sampled += self._rest is None

    def body(self) -> EstimateBody:
        """The estimate of the lines so far."""
        cost_usd = None
        if not self._sum.llm_calls:
            cost_usd = 0.0
        elif self._prices is not None:
            cost_usd = self._prices.usd(self._sum.prompt_tokens, self._sum.completion_tokens)
        return EstimateBody(
            **asdict(self._sum),
            bad_lines=self._bad_lines,
            cost_usd=cost_usd,
            tokenizer=self._sample.tokenizer_name,
            sampled=self._rest is not None,
            sample_records=self._sampled,
        )


def require_prices(options: JobOptions, config: PruneConfig, prices: Prices | None) -> None:
    """Refuse a cost cap that could not be held: without prices nothing is metered."""
    if options.cost_cap_usd is None or prices is not None or not uses_llm(config):
        return
    detail = (
        "this server knows no prices of its LLM, so it cannot hold a cost cap; leave it out, "
        "or ask the operator to set ASAP_LLM__PRICE_IN and ASAP_LLM__PRICE_OUT"
    )
    raise InvalidInput(detail, errors=[{"pointer": "/cost_cap_usd", "detail": detail}])


def check_cap(planned: EstimateBody, options: JobOptions) -> None:
    """Raise CostCapReached when the estimate is above the cap of the job."""
    cap, cost = options.cost_cap_usd, planned.cost_usd
    if cap is not None and cost is not None and cost > cap:
        raise CostCapReached(
            f"the job would cost about {cost:.4f} US dollars, more than its cap of {cap:g}; "
            "raise cost_cap_usd, or submit fewer records"
        )


class _Observed:
    """A counter that remembers how many characters a token had."""

    def __init__(self, counter: TokenCounter) -> None:
        self._counter = counter
        self._characters = self._tokens = 0

    @property
    def tokenizer_name(self) -> str:
        return self._counter.tokenizer_name

    @property
    def characters_per_token(self) -> float:
        return max(self._characters, 1) / max(self._tokens, 1)

    def count(self, text: str) -> int:
        tokens = self._counter.count(text)
        self._characters += len(text)
        self._tokens += tokens
        return tokens
