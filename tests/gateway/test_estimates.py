from __future__ import annotations

import pytest

from asap.config import PruneConfig
from asap.errors import CostCapReached, InvalidInput
from asap.estimate import Prices, estimate
from asap.types import Record, Triple
from asap_gateway import estimates
from asap_gateway.estimates import check_cap, estimate_job, require_prices
from asap_gateway.schemas import JobOptions
from fakes import TableScorer

COUNTER = TableScorer(lambda steps: [])
PRICES = Prices(1.0, 10.0)
ASAP = PruneConfig()


def triples(count, words=20):
    return [
        Triple(question="why is it so", cot="\n\n".join(["word " * words] * 5), answer=f"a {n}")
        for n in range(count)
    ]


def test_a_job_is_estimated_as_the_library_does():
    batch = triples(7)
    body = estimate_job(batch, ASAP, COUNTER, PRICES)
    planned = estimate([Record(triple=t, config=ASAP) for t in batch], ASAP, COUNTER)
    assert (body.records, body.llm_calls, body.cot_tokens) == (7, 14, planned.cot_tokens)
    assert body.scored_tokens == planned.scored_tokens > 0
    assert body.cost_usd == pytest.approx(
        (planned.prompt_tokens * 1.0 + planned.completion_tokens * 10.0) / 1e6
    )
    assert (body.tokenizer, body.sampled, body.sample_records) == ("words", False, 7)


def test_a_bad_line_is_counted_and_costs_nothing():
    good = estimate_job(triples(2), ASAP, COUNTER, PRICES)
    mixed = estimate_job(
        [*triples(1), InvalidInput("line 2"), triples(2)[1]], ASAP, COUNTER, PRICES
    )
    assert mixed == good.model_copy(update={"bad_lines": 1})


def test_without_a_tokenizer_the_estimate_says_what_it_counted():
    body = estimate_job(triples(3), ASAP, None, PRICES)
    assert body.tokenizer == "characters/3.5"
    assert body.cot_tokens == 3 * -(-len(triples(1)[0].cot) * 2 // 7)


def test_without_prices_the_cost_is_unknown_unless_nothing_is_paid():
    assert estimate_job(triples(1), ASAP, COUNTER, None).cost_usd is None
    free = PruneConfig(anchor="extractive")
    assert estimate_job(triples(1), free, COUNTER, None).cost_usd == 0.0


def test_a_large_job_is_read_once_and_only_its_head_is_tokenized(monkeypatch):
    monkeypatch.setattr(estimates, "SAMPLE", 10)
    counted = []

    class Counting(TableScorer):
        def count(self, text):
            counted.append(text)
            return super().count(text)

    # the tail is four times as long as the head: a mean per record would be far off
    lines = iter([*triples(10, words=20), *triples(90, words=80)])
    body = estimate_job(lines, ASAP, Counting(lambda steps: []), PRICES)
    exact = estimate_job([*triples(10, 20), *triples(90, 80)][:10], ASAP, COUNTER, PRICES)
    assert exact.sampled is False
    assert len(counted) == 30
    assert (body.records, body.sampled, body.sample_records) == (100, True, 10)
    truth = sum(COUNTER.count(t.cot) for t in [*triples(10, 20), *triples(90, 80)])
    assert body.cot_tokens == pytest.approx(truth, rel=0.05)


def test_an_empty_job_takes_nothing():
    body = estimate_job([], ASAP, None, PRICES)
    assert (body.records, body.cost_usd) == (0, 0.0)


def test_an_estimate_above_the_cap_is_refused():
    body = estimate_job(triples(10), ASAP, COUNTER, PRICES)
    check_cap(body, JobOptions())
    check_cap(body, JobOptions(cost_cap_usd=body.cost_usd))
    with pytest.raises(CostCapReached, match="cap"):
        check_cap(body, JobOptions(cost_cap_usd=body.cost_usd * 0.99))


def test_a_cap_needs_prices_where_money_is_spent():
    capped = JobOptions(cost_cap_usd=1.0)
    with pytest.raises(InvalidInput) as refused:
        require_prices(capped, ASAP, None)
    assert refused.value.context["errors"][0]["pointer"] == "/cost_cap_usd"
    require_prices(capped, ASAP, PRICES)
    require_prices(capped, PruneConfig(method="asap_stage2"), None)
    require_prices(JobOptions(), ASAP, None)
