"""Is a difference more than luck? Wilcoxon signed ranks, exact McNemar, bootstrap intervals and
Holm's correction. Pure Python; nothing here draws without a seed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Literal

from asap.types import Frozen

__all__ = ["Interval", "Wilcoxon", "bootstrap_mean", "holm", "mcnemar", "wilcoxon"]

EXACT_UP_TO = 50
"""Differences; above, the normal approximation with correction for ties."""


class Wilcoxon(Frozen):
    """Signed ranks of paired differences."""

    n: int
    """Differences other than zero."""
    zeros: int
    w_plus: float
    """Sum of the ranks of the positive differences."""
    w_minus: float
    exact: bool
    p_two_sided: float
    p_greater: float
    """One-sided: the differences tend to be positive."""


class Interval(Frozen):
    """A mean and its bootstrap percentile interval."""

    mean: float
    low: float
    high: float
    level: float


def wilcoxon(
    differences: Sequence[float], *, zeros: Literal["wilcox", "pratt"] = "wilcox"
) -> Wilcoxon:
    """The signed-rank test. Equal sizes share their mean rank.

    `wilcox` drops zeros before ranking; `pratt` ranks them and drops their ranks. Exact, by all
    signs of the ranks, up to 50 differences. Without any difference both p-values are 1.
    """
    ranked = [d for d in differences if d != 0] if zeros == "wilcox" else list(differences)
    ranks = _ranks([abs(d) for d in ranked])
    pairs = [(d > 0, rank) for d, rank in zip(ranked, ranks, strict=True) if d != 0]
    w_plus = math.fsum(rank for positive, rank in pairs if positive)
    w_minus = math.fsum(rank for positive, rank in pairs if not positive)
    exact = len(pairs) <= EXACT_UP_TO
    upper_tail = _exact_tail if exact else _normal_tail
    greater = upper_tail([rank for _, rank in pairs], w_plus)
    less = upper_tail([rank for _, rank in pairs], w_minus)
    return Wilcoxon(
        n=len(pairs),
        zeros=sum(d == 0 for d in differences),
        w_plus=w_plus,
        w_minus=w_minus,
        exact=exact,
        p_two_sided=min(1.0, 2 * min(greater, less)),
        p_greater=greater,
    )


def _ranks(sizes: Sequence[float]) -> list[float]:
    """1 for the smallest; equal sizes get the mean of their places."""
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    ranks, place = [0.0] * len(sizes), 0
    for _, tied in groupby(order, key=sizes.__getitem__):
        indices = list(tied)
        for index in indices:
            ranks[index] = place + (len(indices) + 1) / 2
        place += len(indices)
    return ranks


def _exact_tail(ranks: Sequence[float], w: float) -> float:
    """P(W >= w) when each rank is positive with probability 1/2. Ranks are halves of integers."""
    ways = {0: 1}
    for rank in ranks:
        step = round(2 * rank)
        grown = dict(ways)
        for total, count in ways.items():
            grown[total + step] = grown.get(total + step, 0) + count
        ways = grown
    tail = sum(count for total, count in ways.items() if total >= round(2 * w))
    return float(tail / 2 ** len(ranks))


def _normal_tail(ranks: Sequence[float], w: float) -> float:
    # Each rank adds rank/2 to the mean and rank^2/4 to the variance; ties and Pratt's missing ranks
    # are thereby corrected for.
    mean = math.fsum(ranks) / 2
    deviation = math.sqrt(math.fsum(rank * rank for rank in ranks)) / 2
    return 0.5 * math.erfc((w - mean) / deviation / math.sqrt(2))


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p of a paired yes/no outcome, from the pairs that disagree."""
    n, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return float(min(1.0, 2 * tail / 2**n))


def bootstrap_mean(
    values: Sequence[float], *, seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> Interval:
    """The mean of one or more values and its percentile interval over resampled tasks.

    For a paired difference give the differences. The order of the values does not matter.
    """
    ordered, n = sorted(values), len(values)
    draw = random.Random(seed).choices
    means = sorted(math.fsum(draw(ordered, k=n)) / n for _ in range(resamples))
    outside = (1 - level) / 2
    return Interval(
        mean=math.fsum(ordered) / n,
        low=means[math.floor(outside * (resamples - 1))],
        high=means[math.ceil((1 - outside) * (resamples - 1))],
        level=level,
    )


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values by name: reject where they are below the level."""
    adjusted, highest, left = {}, 0.0, len(p_values)
    for name, p in sorted(p_values.items(), key=lambda item: (item[1], item[0])):
        highest = max(highest, min(1.0, left * p))
        adjusted[name] = highest
        left -= 1
    return {name: adjusted[name] for name in p_values}
