"""The removal engine against the loop that tokenises the rest after every removal, in one run.

python benchmarks/selection.py
"""

from __future__ import annotations

import math
import random

from report import best_of, show, traces

from asap.selection import remove_lowest
from asap.steps import join_steps, split_steps
from asap_surprisal.tokenization import HFTokenCounter

REFERENCE_REMOVALS = 40
"""The loop is timed for so many removals at most and scaled up: 10,000 steps would take hours."""


def main() -> None:
    counter = HFTokenCounter.load("demo")
    rng = random.Random(0)
    pool = [step for trace in traces() for step in split_steps(trace["cot"])]
    rows = []
    for size in (100, 300, 1_000, 3_000, 10_000):
        steps = [rng.choice(pool) for _ in range(size)]
        scores = [rng.random() for _ in steps]
        alone = counter.count_all(steps)
        joined = counter.count_all([step + "\n\n" for step in steps])
        budget = (sum(joined) - joined[-1] + alone[-1]) // 2

        def ours(s=scores, a=alone, j=joined, b=budget):
            return remove_lowest(s, a, j, max_tokens=b)

        fast, choice = best_of(5, ours)
        removals = min(len(choice.removed), REFERENCE_REMOVALS)

        def reference(steps=steps, scores=scores, removals=removals):
            kept = list(range(len(steps)))
            for _ in range(removals):
                kept.remove(min(kept, key=scores.__getitem__))
                counter.count(join_steps([steps[i] for i in kept]))

        slow, _ = best_of(1, reference)
        slow *= len(choice.removed) / removals
        exact = counter.count(join_steps([steps[i] for i in choice.kept])) == choice.tokens
        rows.append(
            (
                f"{size:,}",
                f"{sum(joined):,}",
                f"{len(choice.removed):,}",
                f"{'' if removals == len(choice.removed) else '~'}{slow:.2f}",
                f"{fast * 1e3:.2f}",
                f"{fast / (size * math.log2(size)) * 1e9:.0f}",
                f"{slow / fast:,.0f}x",
                "exact" if exact else "WRONG",
            )
        )
    show(
        "Removal down to half of the tokens (~: scaled up from the first 40 removals)",
        (
            "steps",
            "tokens",
            "removed",
            "re-tokenising s",
            "ours ms",
            "ns / (n log n)",
            "ratio",
            "count",
        ),
        rows,
    )


if __name__ == "__main__":
    main()
