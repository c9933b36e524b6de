"""Every real trace through both stages: what must hold for each of them, at any budget."""

from __future__ import annotations

import pytest

from asap.config import PruneConfig
from asap.fine import fine_prune, rebudget
from asap.steps import split_steps
from asap.types import Record, Triple
from asap_runtime.pipeline import prune

FIRST, OTHERS = 512, (64, 1500, 4096)


class Remembering:
    """The demo scorer; equal requests are answered from memory, since scores know no budget."""

    def __init__(self, scorer):
        self._scorer, self._known = scorer, {}
        self.name, self.tokenizer_name, self.count = (
            scorer.name,
            scorer.tokenizer_name,
            scorer.count,
        )

    async def score(self, requests):
        new = [request for request in requests if request not in self._known]
        self._known |= dict(zip(new, await self._scorer.score(new), strict=True))
        return [self._known[request] for request in requests]


@pytest.fixture(scope="module")
def scorer():
    from asap_surprisal.scorer import TorchScorer

    loaded = TorchScorer.load("demo", device="cpu")
    yield Remembering(loaded)
    loaded.close()


def config(**values):
    return PruneConfig(anchor="extractive", **values)


def check(record: Record, trace: dict, budget: int) -> None:
    assert (record.triple.question, record.triple.answer) == (trace["question"], trace["answer"])
    source, kept = split_steps(trace["cot"], record.config.split), record.kept_steps
    assert list(kept) == sorted(set(kept))
    assert kept
    if len(kept) < len(source):
        assert record.pruned_cot == "\n\n".join(source[i] for i in kept)
    else:
        assert record.pruned_cot == trace["cot"]
    assert record.tokens.pruned <= budget or "over_budget" in record.flags
    assert "counts_not_additive" not in record.flags


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_all_traces_at_four_budgets(real_traces, scorer):
    triples = [
        Triple(**{k: trace[k] for k in ("id", "question", "cot", "answer")})
        for trace in real_traces
    ]
    first = await prune(triples, config(max_tokens=FIRST), scorer=scorer)
    for record, trace in zip(first, real_traces, strict=True):
        check(record, trace, FIRST)
        assert Record.model_validate_json(record.model_dump_json()) == record
    for budget in OTHERS:
        full = await prune(triples, config(max_tokens=budget), scorer=scorer)
        for record, start, trace in zip(full, first, real_traces, strict=True):
            check(record, trace, budget)
            assert rebudget(start, record.config) == record


async def test_other_splits_methods_and_modes_on_some_traces(real_traces, scorer):
    some = sorted(real_traces, key=lambda trace: len(trace["cot"]))[40:240:20]
    triples = [Triple(**{k: t[k] for k in ("id", "question", "cot", "answer")}) for t in some]
    for values in (
        {"split": "code"},
        {"split": "paper"},
        {"method": "asap_stage2", "context": "chat"},
        {"method": "random"},
        {"method": "truncate"},
        {"score": "mean_surprisal"},
        {"score": "step_entropy"},
        {"score": "first_token_entropy"},
        {"mode": "iterative", "rescore_every": 5},
        {"refill": True},
    ):
        for record, trace in zip(
            await prune(triples, config(max_tokens=200, **values), scorer=scorer), some, strict=True
        ):
            check(record, trace, 200)


@pytest.mark.slow
async def test_a_trace_of_two_hundred_thousand_tokens_is_scored_in_windows(scorer):
    steps = [f"Step {i} weighs {i * i % 97} against {i % 13} and goes on." for i in range(11_000)]
    triple = Triple(question="q", cot="\n\n".join(steps), answer="a")
    one = Record(triple=triple, config=PruneConfig(method="asap_stage2", max_tokens=1000))
    [done] = await fine_prune([one], scorer)
    assert done.tokens.original > 200_000
    assert "windowed" in done.flags
    assert done.tokens.pruned <= 1000
    assert None not in done.fine.scored.scores["first_token_surprisal"]
