from __future__ import annotations

import pytest

from asap.config import PruneConfig
from asap.estimate import Estimate, Prices, RoughCounter, Summary, estimate, uses_llm
from asap.types import Attempt, CoarseBlock, Record, TokenCounts, Triple, Usage
from fakes import TableScorer

COUNTER = TableScorer(lambda steps: [])


def records(**config):
    triple = Triple(question="q " * 10, cot="\n\n".join(["w " * 9] * 10), answer="a " * 5)
    return [Record(triple=triple, config=PruneConfig(**config))] * 3


def planned(**config):
    batch = records(**config)
    return estimate(batch, batch[0].config, COUNTER)


def test_select_asks_for_far_fewer_tokens_than_rewrite():
    rewrite, select = planned(), planned(protocol="select")
    assert rewrite.llm_calls == select.llm_calls == 6
    assert select.completion_tokens < rewrite.completion_tokens
    assert select.prompt_tokens > rewrite.prompt_tokens


@pytest.mark.parametrize(
    ("method", "calls", "scores"),
    [("asap", 6, True), ("asap_stage2", 0, True), ("direct", 3, False), ("random", 0, False)],
)
def test_only_the_stages_of_the_method_cost(method, calls, scores):
    plan = planned(method=method)
    assert (plan.llm_calls, plan.scored_tokens > 0) == (calls, scores)


def test_the_extractive_anchor_calls_nobody():
    assert planned(anchor="extractive").llm_calls == 0


def test_cost_is_price_times_tokens():
    plan = planned()
    assert plan.cost_usd(1.0, 0.0) == pytest.approx(plan.prompt_tokens / 1e6)


def test_estimates_add_up():
    half = planned()
    assert half + half == estimate(records() * 2, records()[0].config, COUNTER)
    assert Estimate() + half == half


def test_only_the_llm_anchor_costs_money():
    assert uses_llm(PruneConfig())
    assert uses_llm(PruneConfig(method="direct"))
    assert not uses_llm(PruneConfig(anchor="extractive"))
    assert not uses_llm(PruneConfig(method="asap_stage2"))


def test_a_rough_count_is_named_as_what_it_is():
    assert (RoughCounter().count("x" * 35), RoughCounter().count("x" * 36)) == (10, 11)
    assert RoughCounter().count("") == 0
    assert RoughCounter().tokenizer_name == "characters/3.5"
    assert RoughCounter(2.0).count("xxxx") == 2


def test_summary_adds_up_records():
    attempts = [
        Attempt(
            purpose="direct", number=1, outcome="accepted", reply_chars=9, usage=Usage(calls=1)
        ),
        Attempt(purpose="coarse", number=1, outcome="empty", reply_chars=0, usage=Usage(calls=1)),
        Attempt(
            purpose="coarse", number=2, outcome="accepted", reply_chars=9, usage=Usage(calls=1)
        ),
    ]
    block = CoarseBlock(
        protocol="select", model="m", kept=(0, 1), status="accepted", attempts=tuple(attempts)
    )
    record = records()[0].with_coarse(block)
    counts = TokenCounts(tokenizer="t", original=100, coarse=20, pruned=20)
    summary = Summary()
    summary.add(record.with_tokens(counts))
    summary.add(records()[0])
    assert (summary.records, summary.steps, summary.kept_steps) == (2, 20, 12)
    assert (summary.attempts, summary.first_attempt, summary.usage.calls) == (2, 0, 3)
    assert summary.kept_ratio == 0.2
    assert summary.statuses == {"compressed": 1, "unchanged": 1}


def test_cached_tokens_and_batches_have_prices_of_their_own():
    prices = Prices(2.0, 8.0, price_cached=0.5, batch_share=0.5)
    assert prices.usd(1_000_000, 500_000) == pytest.approx(6.0)
    assert prices.usd(1_000_000, 500_000, cached=400_000) == pytest.approx(5.4)
    assert prices.usd(1_000_000, 500_000, cached=400_000, batch=True) == pytest.approx(2.7)
    assert Prices(2.0, 8.0).usd(1_000_000, 0, cached=400_000) == pytest.approx(2.0)
    of_batches = prices.of_batches().usd(1_000_000, 500_000, cached=400_000)
    assert of_batches == pytest.approx(2.7)
