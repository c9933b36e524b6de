from __future__ import annotations

import pytest
from prometheus_client import REGISTRY

from asap_surprisal.figures import Figures
from scoring import STEPS, load, request_of

NAMES = {
    "asap_score_rows_total": 2,
    "asap_score_passes_total": 1,
    "asap_score_steps_total": 2 * len(STEPS),
}


def value(name, **labels):
    return REGISTRY.get_sample_value(name, labels) or 0.0


def seen(scorer):
    return {name: value(name) for name in NAMES} | {
        "tokens": value("asap_score_tokens_total", part="run"),
        "operations": value("asap_score_operations_total"),
        "busy_s": value("asap_score_busy_seconds_total"),
    }


def test_what_a_scorer_did_is_counted_once_and_what_it_did_before_never(tiny_model_dir):
    scorer = load(tiny_model_dir)
    scorer.score_batch([request_of()])
    before = seen(scorer)
    figures = Figures(scorer)
    figures.update()
    assert seen(scorer) == before
    start = scorer.totals
    scorer.score_batch([request_of(), request_of()])
    figures.update()
    figures.update()
    after, totals = seen(scorer), scorer.totals
    wanted = NAMES | {
        "tokens": totals.tokens - start.tokens,
        "operations": totals.operations - start.operations,
        "busy_s": totals.busy_s - start.busy_s,
    }
    assert min(wanted.values()) > 0
    assert {name: after[name] - before[name] for name in before} == pytest.approx(wanted)
    share = wanted["operations"] / wanted["busy_s"] / value("asap_score_peak_rate")
    assert 0 < share < 1
    scorer.close()
