"""The removal engine against the loop that tokenises the rest after every removal, in one run.

python benchmarks/selection.py
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from functools import partial

from report import best_of, show, traces

from asap.selection import remove_lowest
from asap.steps import join_steps, split_steps
from asap_surprisal.tokenization import HFTokenCounter

REFERENCE_SECONDS = 10.0
"""The loop is stopped after this long and scaled up: 10,000 steps would take half an hour."""


def re_tokenising(
    steps: Sequence[str], scores: Sequence[float], removals: int, counter: HFTokenCounter
) -> tuple[float, bool]:
    """Seconds of the authors' loop for so many removals, and whether it was scaled up."""
    kept = list(range(len(steps)))
    started = time.perf_counter()
    for done in range(1, removals + 1):
        kept.remove(min(kept, key=scores.__getitem__))
        counter.count(join_steps([steps[i] for i in kept]))
        elapsed = time.perf_counter() - started
        if elapsed > REFERENCE_SECONDS:
            return elapsed * removals / done, done < removals
    return time.perf_counter() - started, False


def main() -> None:
    counter = HFTokenCounter.load("demo")
    rng = random.Random(0)
    pool = [step for trace in traces() for step in split_steps(trace["cot"])]
    rows = []
    for size in (100, 300, 1_000, 3_000, 10_000):
        steps = [rng.choice(pool) for _ in range(size)]
        scores = [rng.random() for _ in steps]

        def tokenise(steps: Sequence[str] = steps) -> tuple[list[int], list[int]]:
            return counter.count_all(steps), counter.count_all([step + "\n\n" for step in steps])

        once, (alone, joined) = best_of(3, tokenise)
        budget = (sum(joined) - joined[-1] + alone[-1]) // 2
        engine = partial(remove_lowest, scores, alone, joined, max_tokens=budget)
        fast, choice = best_of(5, engine)
        slow, scaled = re_tokenising(steps, scores, len(choice.removed), counter)
        exact = counter.count(join_steps([steps[i] for i in choice.kept])) == choice.tokens
        rows.append(
            (
                f"{size:,}",
                f"{sum(joined):,}",
                f"{len(choice.removed):,}",
                f"{'~' if scaled else ''}{slow:.2f}",
                f"{once * 1e3:.1f}",
                f"{fast * 1e3:.2f}",
                f"{fast / (size * math.log2(size)) * 1e9:.0f}",
                f"{slow / (once + fast):,.0f}x",
                "exact" if exact else "WRONG",
            )
        )
    show(
        "Removal down to half of the tokens (~: scaled up)",
        (
            "steps",
            "tokens",
            "removed",
            "re-tokenising s",
            "tokenise once ms",
            "remove ms",
            "ns / (n log n)",
            "ratio",
            "count",
        ),
        rows,
    )


if __name__ == "__main__":
    main()
