from __future__ import annotations

import pytest

from asap.config import PruneConfig
from asap.estimate import Summary, estimate
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
