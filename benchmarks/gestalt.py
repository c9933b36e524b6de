"""Algorithm 1 with exact upper bounds and cydifflib, against difflib alone, in one run.

python benchmarks/gestalt.py
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Sequence

from report import best_of, show, traces

from asap.gestalt import match_in_order
from asap.steps import split_steps

TAU = 0.6
Case = list[tuple[list[str], list[str]]]


def reference(source: Sequence[str], reply: Sequence[str]) -> list[int] | None:
    """Algorithm 1 as published: one difflib matcher per reply step, the full ratio for each
    pair.
    """
    kept, at = [], 0
    for step in reply:
        matcher = difflib.SequenceMatcher(None, "", step, autojunk=False)
        while at < len(source):
            matcher.set_seq1(source[at])
            at += 1
            if matcher.ratio() >= TAU:
                kept.append(at - 1)
                break
        else:
            return None
    return kept


def ours(source: Sequence[str], reply: Sequence[str]) -> list[int] | None:
    """The shipped matcher."""
    report = match_in_order(source, reply, tau=TAU)
    return list(report.kept) if report.valid else None


def cut_words(step: str, rng: random.Random) -> str:
    """A reply step that keeps 80 in 100 words of its source."""
    return " ".join(word for word in step.split(" ") if rng.random() < 0.8) or step


def cases() -> dict[str, Case]:
    """Pairs of source steps and reply steps, all cut from real traces."""
    rng = random.Random(0)
    real = [split_steps(trace["cot"]) for trace in traces()]
    pool = [step.strip() for steps in real for step in steps]
    short = [step for step in pool if 20 <= len(step) <= 80]
    long = [" ".join(rng.sample(pool, 25))[:2000] for _ in range(40)]

    def faithful(steps: Sequence[str]) -> tuple[list[str], list[str]]:
        source = [step.strip() for step in steps]
        return source, [cut_words(step, rng) for step in source if rng.random() < 0.4]

    thousand = [faithful(rng.sample(pool, 1000))]
    return {
        "real traces, words cut": [faithful(steps) for steps in real],
        "short steps (20-80 chars)": [faithful(rng.sample(short, 100)) for _ in range(20)],
        "long steps (2,000 chars)": [faithful(long)],
        "failing (steps of another trace)": [
            (rng.sample(pool, 200), [step]) for step in rng.sample(long, 10) + rng.sample(short, 10)
        ],
        "one trace of 1,000 steps": thousand,
    }


def main() -> None:
    rows = []
    for name, pairs in cases().items():
        pairs = [pair for pair in pairs if pair[1]]
        slow, expected = best_of(1, lambda pairs=pairs: [reference(*pair) for pair in pairs])
        fast, got = best_of(3, lambda pairs=pairs: [ours(*pair) for pair in pairs])
        same = "identical" if got == expected else "DIFFERENT"
        rows.append(
            (
                name,
                len(pairs),
                f"{slow * 1e3:.0f}",
                f"{fast * 1e3:.1f}",
                f"{slow / fast:.1f}x",
                same,
            )
        )
    show(
        "Gestalt matching (Algorithm 1), tau 0.6, autojunk off",
        ("case", "replies", "difflib ms", "ours ms", "ratio", "verdicts"),
        rows,
    )


if __name__ == "__main__":
    main()
