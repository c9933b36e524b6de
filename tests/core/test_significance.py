from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asap.significance import bootstrap_mean, holm, mcnemar, wilcoxon

small = st.lists(st.integers(-6, 6), min_size=1, max_size=9)


def by_all_signs(differences, zeros):
    """(W+, one-sided p, two-sided p) by every assignment of signs."""
    ranked = [d for d in differences if d] if zeros == "wilcox" else differences
    sizes = sorted(map(abs, ranked))
    rank = {s: sizes.index(s) + (sizes.count(s) + 1) / 2 for s in sizes}
    ranks = [(rank[abs(d)], d > 0) for d in ranked if d]
    seen = sum(r for r, positive in ranks if positive)
    sums = [
        sum(r for (r, _), sign in zip(ranks, signs, strict=True) if sign)
        for signs in itertools.product((0, 1), repeat=len(ranks))
    ]
    greater = sum(s >= seen for s in sums) / len(sums)
    less = sum(s <= seen for s in sums) / len(sums)
    return seen, greater, min(1.0, 2 * min(greater, less))


def test_the_worked_signed_ranks():
    result = wilcoxon([3, -1, 4, 2, -5, 6])
    assert (result.w_plus, result.w_minus, result.exact) == (15, 6, True)
    assert (result.p_greater, result.p_two_sided) == (14 / 64, 28 / 64)


def test_five_wins_of_five_are_significant_one_sided_only():
    result = wilcoxon([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (result.p_greater, result.p_two_sided) == (1 / 32, 1 / 16)


@pytest.mark.parametrize("zeros", ["wilcox", "pratt"])
@given(differences=small)
def test_signed_ranks_equal_the_count_of_all_signs(zeros, differences):
    result = wilcoxon(differences, zeros=zeros)
    assert (result.w_plus, result.p_greater, result.p_two_sided) == by_all_signs(differences, zeros)
    assert result.n + result.zeros == len(differences)


def test_no_difference_is_no_evidence():
    result = wilcoxon([0, 0, 0], zeros="pratt")
    assert (result.n, result.p_two_sided, result.p_greater) == (0, 1, 1)


def test_many_differences_by_the_normal_law_corrected_for_ties():
    values = [(-1) ** (i % 3 == 0) * (i % 17 + 1) for i in range(200)]
    assert wilcoxon(values[:50]).exact
    result, n = wilcoxon(values), 200
    ties = [sum(abs(v) == size for v in values) for size in range(1, 18)]
    variance = n * (n + 1) * (2 * n + 1) / 24 - sum(t**3 - t for t in ties) / 48
    z = (result.w_plus - n * (n + 1) / 4) / math.sqrt(variance)
    assert not result.exact
    assert result.p_greater == pytest.approx(0.5 * math.erfc(z / math.sqrt(2)))
    assert result.p_two_sided == pytest.approx(math.erfc(abs(z) / math.sqrt(2)))


@pytest.mark.parametrize("zeros", ["wilcox", "pratt"])
def test_signed_ranks_equal_scipys(zeros):
    stats = pytest.importorskip("scipy.stats")
    values = [((7 * i) % 23) - 9 for i in range(120)]
    own = wilcoxon(values, zeros=zeros)
    theirs = stats.wilcoxon(values, zero_method=zeros, method="approx")
    assert own.p_two_sided == pytest.approx(theirs.pvalue)


@pytest.mark.parametrize(
    ("first", "second", "p"), [(7, 0, 2 / 128), (17, 10, 0.248), (0, 0, 1), (3, 3, 1), (1, 0, 1)]
)
def test_the_worked_mcnemar(first, second, p):
    assert mcnemar(first, second) == pytest.approx(p, abs=5e-4)
    assert mcnemar(second, first) == mcnemar(first, second)


@settings(deadline=None)
@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30), st.randoms())
def test_the_interval_lies_in_the_data_and_ignores_order(values, shuffler):
    interval = bootstrap_mean(values, seed=3, resamples=200)
    assert min(values) - 1e-9 <= interval.low <= interval.high <= max(values) + 1e-9
    shuffled = list(values)
    shuffler.shuffle(shuffled)
    assert bootstrap_mean(shuffled, seed=3, resamples=200) == interval


def test_the_interval_is_about_two_standard_errors():
    shares = [100.0] * 97 + [0.0] * 171  # 97 of 268: one standard error is 2.9 points
    interval = bootstrap_mean(shares)
    assert interval.mean == pytest.approx(36.19, abs=0.01)
    assert interval.low == pytest.approx(36.19 - 5.75, abs=0.8)
    assert interval.high == pytest.approx(36.19 + 5.75, abs=0.8)
    assert bootstrap_mean(shares, seed=1) != interval


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06}
    )
    assert holm({}) == {}


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), max_size=8))
def test_holm_never_lowers_and_keeps_the_order(p_values):
    adjusted = holm(p_values)
    assert list(adjusted) == list(p_values)
    assert all(p_values[name] <= adjusted[name] <= 1 for name in p_values)
    ordered = sorted(p_values, key=p_values.__getitem__)
    assert [adjusted[name] for name in ordered] == sorted(adjusted.values())
