"""How often pruning cuts a piece of code in the middle, by split.

The judge does not use the rules of the `code` split. In the emitted CoT a block is torn when it
starts with indented text whose block before it in the source is gone, or ends with a line that
opens a Python block while the block behind it in the source is gone.

    python benchmarks/codesplit.py
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from report import best_of, show, traces

from asap.extractive import select_steps
from asap.steps import Split, join_steps, split_steps

OPENER = re.compile(r"^ *(def|class|for|while|if|elif|else|try|except|with)\b.*:$")
INDENTED = re.compile(r"^ {2,}(?![-*•\d ])[A-Za-z_].*[=(:]|^ {2,}(return|break|continue|pass)\b")


def torn(blocks: Sequence[str], present: frozenset[int]) -> int:
    """Kept blocks that lost the block they belong to."""
    count = 0
    for place in present:
        lines = blocks[place].split("\n")
        continues = place > 0 and INDENTED.match(lines[0]) is not None
        goes_on = place + 1 < len(blocks) and blocks[place + 1][0] == " "
        count += continues and place - 1 not in present
        count += goes_on and OPENER.match(lines[-1]) is not None and place + 1 not in present
    return count


def blocks_of(steps: Sequence[str], blocks: Sequence[str]) -> list[list[int]]:
    """For each step the `safe` blocks that it is made of."""
    parts, at = [], 0
    for step in steps:
        end = at + 1
        while join_steps(blocks[at:end]) != step:
            end += 1
        parts.append(list(range(at, end)))
        at = end
    return parts


def main() -> None:
    rows: list[tuple[object, ...]] = []
    data = traces()
    for split in ("safe", "code"):
        for selector in ("random half", "extractive half"):
            rows.append(measure(data, split, selector))
    show(
        f"Code cut in the middle, {len(data)} code traces (judged on the safe blocks)",
        ("split, selector", "steps", "prunings with torn code", "torn blocks", "ms per trace"),
        rows,
    )


def measure(data: Sequence[dict[str, str]], split: Split, selector: str) -> tuple[object, ...]:
    """One row: every trace pruned once."""
    rng = random.Random(0)
    steps_total = cut = blocks = 0
    seconds = 0.0
    for trace in data:
        elapsed, steps = best_of(1, lambda trace=trace: split_steps(trace["cot"], split))
        seconds += elapsed
        steps_total += len(steps)
        if selector == "random half":
            kept = sorted(rng.sample(range(len(steps)), (len(steps) + 1) // 2))
        else:
            kept = list(select_steps(steps, trace["answer"], 0.5))
        safe = split_steps(trace["cot"])
        parts = blocks_of(steps, safe)
        count = torn(safe, frozenset(block for i in kept for block in parts[i]))
        cut += count > 0
        blocks += count
    return (
        f"{split}, {selector}",
        f"{steps_total:,}",
        f"{cut} ({cut / len(data):.1%})",
        blocks,
        f"{seconds / len(data) * 1e3:.2f}",
    )


if __name__ == "__main__":
    main()
