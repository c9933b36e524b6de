"""The paper's printed results as data: every accuracy is a number of solved tasks, and what the
text derives from them follows.
"""

from __future__ import annotations

import pytest

from asap.eval_config import BENCHMARKS, EVAL_PRESETS
from asap.metrics import kept_ratio
from asap.paper_tables import PRINTED, SWEPT, TRAINING_TOKENS, printed_for
from asap.significance import mcnemar, wilcoxon

FIVE = EVAL_PRESETS["paper"]["benchmarks"]
MAIN = {
    (p.model, p.method, p.benchmark): p
    for p in PRINTED
    if p.budget == BENCHMARKS[p.benchmark].budget
}
BASELINES = (
    "Zero-shot",
    "Original",
    "Selective Context",
    "LLMLingua-2",
    "TokenSkip",
    "SPIRIT",
)


def qwen(method):
    return [MAIN["Qwen-7B", method, benchmark] for benchmark in FIVE]


def at(benchmark, thousands, method):
    (cell,) = [
        p
        for p in PRINTED
        if (p.model, p.method, p.benchmark, p.budget)
        == ("Qwen-7B", method, benchmark, 1024 * thousands)
    ]
    return cell


def test_every_cell_is_there_once():
    keys = {(p.model, p.method, p.benchmark, p.budget) for p in PRINTED}
    # 9 methods of one model and 4 of the other on 5 benchmarks, and 21 swept budgets of 4 methods.
    assert len(keys) == len(PRINTED) == 9 * 5 + 4 * 5 + 21 * 4
    for name in FIVE:
        swept = {p.budget for p in printed_for(name) if p.method == "ASAP"}
        assert swept == set(BENCHMARKS[name].sweep)
    assert printed_for("mbpp-plus") == []


def test_every_accuracy_is_a_number_of_solved_tasks():
    odd = [
        (p.method, p.benchmark, p.budget, p.accuracy, p.solved)
        for p in PRINTED
        if f"{100 * p.solved / BENCHMARKS[p.benchmark].tasks:.2f}" != f"{p.accuracy:.2f}"
    ]
    # 69 of 268 is 25.746: cut where all others are rounded.
    assert odd == [("Original", "livecodebench-v4-v5", 8192, 25.74, 69)]


@pytest.mark.parametrize(
    ("benchmark", "solved"),
    [
        ("humaneval", [121, 128, 98, 117, 126, 137, 138]),
        ("livecodebench-v1-v3", [258, 319, None, None, None, 311, 335]),
        ("livecodebench-v4-v5", [68, 83, None, None, None, 90, 97]),
        ("leetcode", [45, 57, None, None, None, 57, 63]),
    ],
)
def test_solved_counts(benchmark, solved):
    found = [MAIN["Qwen-7B", method, benchmark].solved for method in (*BASELINES, "ASAP")]
    known = [mine if given is not None else None for mine, given in zip(found, solved, strict=True)]
    assert known == solved


def test_a_budget_bounds_the_mean_and_k_is_1024():
    assert all(p.tokens <= p.budget for p in PRINTED)
    assert at("leetcode", 2, "Zero-shot").tokens == 2028 > 2000
    assert at("humaneval", 1, "Zero-shot").tokens == 1007 > 1000


def test_asap_beats_every_baseline_on_all_five_so_one_sided_significance_only():
    for baseline in BASELINES:
        differences = [
            own.accuracy - other.accuracy
            for own, other in zip(qwen("ASAP"), qwen(baseline), strict=True)
        ]
        test = wilcoxon(differences)
        assert (test.p_greater, test.p_two_sided) == (0.03125, 0.0625)


def test_the_margin_over_the_best_baseline_is_small():
    best = [max(MAIN["Qwen-7B", method, b].solved for method in BASELINES) for b in FIVE]
    ours = [cell.solved for cell in qwen("ASAP")]
    pairs = dict(zip(FIVE, zip(ours, best, strict=True), strict=True))
    assert pairs == {
        "humaneval": (138, 137),
        "humaneval-plus": (129, 124),
        "livecodebench-v1-v3": (335, 319),
        "livecodebench-v4-v5": (97, 90),
        "leetcode": (63, 57),
    }
    # Even if no task were lost, six or seven more solved are barely told from luck, one is not.
    assert mcnemar(1, 0) == 1
    assert mcnemar(7, 0) == pytest.approx(0.0156, abs=5e-5)
    assert mcnemar(17, 10) == pytest.approx(0.248, abs=5e-4)


def test_shorter_output_raises_the_batchs_throughput():
    ours, spirit = (MAIN["Qwen-7B", m, "livecodebench-v4-v5"] for m in ("ASAP", "SPIRIT"))
    assert ours.latency_s * 268 == pytest.approx(699, abs=0.5)
    assert ours.tokens / ours.latency_s == pytest.approx(2312, abs=0.5)
    assert spirit.tokens / spirit.latency_s == pytest.approx(1708, abs=0.5)
    assert 1 - ours.latency_s / spirit.latency_s == pytest.approx(0.435, abs=5e-4)
    assert 1 - kept_ratio(ours.tokens, spirit.tokens) == pytest.approx(0.235, abs=5e-4)


@pytest.mark.parametrize(
    ("method", "less"),
    [
        ("Selective Context", 48.4),
        ("LLMLingua-2", 46.9),
        ("TokenSkip", 24.6),
        ("SPIRIT", 53.3),
        ("ASAP", 75.6),
    ],
)
def test_training_tokens_fall_as_printed(method, less):
    original = TRAINING_TOKENS["Original"][0]
    ratio = kept_ratio(TRAINING_TOKENS[method][0], original)
    assert 100 * (1 - ratio) == pytest.approx(less, abs=0.05)


def test_consistently_better_is_not_so():
    assert at("humaneval", 4, "SPIRIT").accuracy == 76.83 > at("humaneval", 4, "ASAP").accuracy
    assert at("leetcode", 4, "SPIRIT").accuracy == 16.23 > at("leetcode", 4, "ASAP").accuracy
    assert at("leetcode", 12, "Original").accuracy == 28.07 > at("leetcode", 12, "ASAP").accuracy
    llama = {m: MAIN["Llama-8B", m, "humaneval"].accuracy for m in ("Original", "ASAP")}
    assert llama == {"Original": 82.32, "ASAP": 80.49}
    live = [MAIN["Llama-8B", m, "livecodebench-v1-v3"].accuracy for m in SWEPT]
    assert live == [44.12, 52.61, 52.61, 48.86]


def test_stage_one_alone_is_worse_than_nothing_on_three():
    alone, without = (
        {cell.benchmark: cell.accuracy for cell in qwen(method)}
        for method in ("w/o fine", "Original")
    )
    worse = {name for name in FIVE if alone[name] < without[name]}
    assert worse == {"humaneval", "humaneval-plus", "livecodebench-v1-v3"}


def test_tokens_never_fall_when_the_budget_grows():
    for name in FIVE:
        for method in SWEPT:
            cells = [p for p in printed_for(name) if (p.model, p.method) == ("Qwen-7B", method)]
            tokens = [cell.tokens for cell in cells]
            assert tokens == sorted(tokens), (name, method)
