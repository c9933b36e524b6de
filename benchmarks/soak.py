"""A long run of the surprisal stage: `python benchmarks/soak.py`, about ten minutes on two cores.

Traces of 50 to 20,000 tokens, log-uniform, 64 at a time; one caller in twenty goes away at a random
moment, one trace in twenty is pruned in rounds. Real stage, real tokenizer and a very small random
model, because what is looked for is not in the model: memory that grows, callers who are forgotten,
entries that stay in the queue, long traces that starve. Exit code 1 when anything of it is found.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, linear_regression, median, quantiles
from typing import Any

from report import REPOSITORY, show
from transformers import Qwen2Config, Qwen2ForCausalLM

from asap.config import PruneConfig
from asap.types import Record, Triple
from asap_runtime.telemetry import SCORE_SECONDS
from asap_surprisal.settings import SurprisalSettings
from asap_surprisal.stage import SurprisalStage
from asap_surprisal.tokenization import HFTokenCounter

sys.path.insert(0, str(REPOSITORY / "tests"))
from tiny_model import SENTENCES, build_tiny_model

SHORTEST = 50
GONE, IN_ROUNDS = 0.05, 0.05
SAMPLES = 200
"""Readings of the memory."""
PAGE = os.sysconf("SC_PAGE_SIZE")
MB = 2**20
ONCE = PruneConfig(method="asap_stage2", keep_ratio=0.5, max_tokens=None)
ROUNDS = ONCE.model_copy(update={"mode": "iterative", "rescore_every": 200})


@dataclass
class Figures:
    """What was seen."""

    answered: int = 0
    gone: int = 0
    lost: int = 0
    tokens: int = 0
    waits: list[float] = field(default_factory=list)
    """Seconds of each entry between its tokens and its batch."""
    calls: list[float] = field(default_factory=list)
    """Seconds of each answered call."""
    memory: list[float] = field(default_factory=list)
    """MB, at equal distances."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=int, default=20_000)
    parser.add_argument("--longest", type=int, default=20_000, help="tokens")
    parser.add_argument("--concurrency", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = build_model(Path(folder) / "model", 2 * options.longest)
        failures = asyncio.run(soak(model, options))
    for failure in failures:
        print(f"FAILED: {failure}")
    sys.exit(bool(failures))


def build_model(directory: Path, window: int) -> Path:
    """The tests' tokenizer and weights that cost next to nothing."""
    build_tiny_model(directory, max_positions=window)
    config = Qwen2Config.from_pretrained(directory)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 8, 8, 1
    config.num_attention_heads = config.num_key_value_heads = 1
    config.layer_types = config.layer_types[:1]
    Qwen2ForCausalLM(config).save_pretrained(directory)
    return directory


async def soak(model: Path, options: argparse.Namespace) -> list[str]:
    """Run, show the table, and give what is wrong."""
    stage = SurprisalStage(
        SurprisalSettings(
            surprisal={"model": str(model), "device": "cpu", "concurrency": options.concurrency}
        )
    )
    await stage.start()
    figures = Figures()
    waited = SCORE_SECONDS.labels("queue")
    waited.observe = figures.waits.append  # the histogram has no largest value
    todo = records(HFTokenCounter.load(str(model)), options)
    started = time.perf_counter()
    figures.memory.append(resident())
    await asyncio.gather(
        *(caller(name, stage, todo, figures, options.traces) for name in range(options.concurrency))
    )
    figures.memory.append(resident())
    seconds = time.perf_counter() - started
    left = stage.scorer.waiting_tokens
    await stage.stop()
    return report(figures, seconds, left, options)


def records(counter: HFTokenCounter, options: argparse.Namespace) -> Iterator[Record]:
    """The traces, made when they are asked for; the same ones in every run."""
    drawn = random.Random(1)
    steps = [step for text in SENTENCES[:4] for step in text.split("\n\n")]
    steps = [" ".join(drawn.choices(steps, k=k)) for k in range(1, 5) for _ in range(50)]
    sizes = [counter.count(step + "\n\n") for step in steps]
    for i in range(options.traces):
        wanted = SHORTEST * (options.longest / SHORTEST) ** drawn.random()
        chosen: list[str] = []
        while wanted > 0 or len(chosen) < 2:  # a single step is not scored
            at = drawn.randrange(len(steps))
            chosen.append(steps[at])
            wanted -= sizes[at]
        config = ROUNDS if drawn.random() < IN_ROUNDS else ONCE
        triple = Triple(id=str(i), question=f"What is {i}?", cot="\n\n".join(chosen), answer="3")
        yield Record(triple=triple, config=config)


async def caller(
    name: int, stage: SurprisalStage, todo: Iterator[Record], figures: Figures, traces: int
) -> None:
    """One after the other, and now and then away before the answer."""
    drawn, loop = random.Random(name), asyncio.get_running_loop()
    for record in todo:
        call = asyncio.create_task(stage.process(record))
        leaves = drawn.random() < GONE
        if leaves:  # at any moment of a usual call, and of a long one
            usual = fmean(figures.calls[-500:] or [0.1])
            loop.call_later(drawn.uniform(0, 1.5 * usual), call.cancel)
        started = time.perf_counter()
        await asyncio.wait({call})
        if call.cancelled():
            figures.gone += leaves
            figures.lost += not leaves
        elif call.exception() is not None or not is_whole(call.result().payload, record):
            figures.lost += 1
        else:
            figures.answered += 1
            figures.calls.append(time.perf_counter() - started)
            figures.tokens += call.result().payload.tokens.original
        done = figures.answered + figures.gone + figures.lost
        if done % max(1, traces // SAMPLES) == 0:
            figures.memory.append(resident())


def is_whole(found: Record, asked: Record) -> bool:
    """Whether the answer is to this question, and every step was scored."""
    if found.id != asked.id or found.fine is None:
        return False
    scores: Any = found.fine.scored.scores.get("first_token_surprisal", ())
    return len(scores) == len(found.fine.scored.tokens) and None not in scores[1:]


def resident() -> float:
    """Memory of this process, in MB, without what the allocator keeps for later where it is glibc:
    how much that is depends on the longest traces that ever met.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / MB


def report(figures: Figures, seconds: float, left: int, options: argparse.Namespace) -> list[str]:
    """The table, and what is wrong."""
    memory, n = figures.memory, len(figures.memory)
    per_sample = options.traces / max(1, n - 1)
    later = memory[n // 4 :]  # the first quarter fills caches and the allocator's pools
    slope = linear_regression(range(len(later)), later).slope / per_sample * 1000
    early, late = memory[n // 4 : n // 2], memory[3 * n // 4 :]
    growth, noise = median(late) - median(early), max(0.05 * median(early), spread(early))
    points = [memory[round(share * (n - 1) / 4)] for share in range(5)]
    show(
        f"Soak: {options.traces:,} traces of {SHORTEST} to {options.longest:,} tokens, "
        f"{options.concurrency} at a time",
        ("what", "figure"),
        [
            ("answered, gone, lost", f"{figures.answered:,}, {figures.gone:,}, {figures.lost:,}"),
            ("tokens left in the queue", left),
            ("seconds", f"{seconds:,.0f}"),
            ("tokens/s of answered traces", f"{figures.tokens / seconds:,.0f}"),
            ("wait for a batch: mean, 99 %, longest", times(figures.waits)),
            ("whole call: mean, 99 %, longest", times(figures.calls)),
            ("MB at start, 1/4, 1/2, 3/4, end", ", ".join(f"{point:,.0f}" for point in points)),
            ("MB per 1,000 traces, from 1/4 on", f"{slope:+.2f}"),
            ("MB, last quarter over second (noise)", f"{growth:+.1f} ({noise:.1f})"),
        ],
    )
    found = {
        f"{figures.lost} callers got no answer or a wrong one": figures.lost,
        f"{left} tokens stayed in the queue": left,
        f"memory grew by {growth:.1f} MB, noise is {noise:.1f} MB": growth > noise,
        "not every trace came to an end": figures.answered + figures.gone + figures.lost
        != options.traces,
    }
    return [failure for failure, is_true in found.items() if is_true]


def spread(values: Sequence[float]) -> float:
    """Between the quartiles."""
    low, _, high = quantiles(values, n=4)
    return high - low


def times(values: Sequence[float]) -> str:
    """Of seconds, in ms; the longest also as a multiple of the mean."""
    mean, worst = fmean(values), max(values)
    late = quantiles(values, n=100)[98]
    return f"{1e3 * mean:,.0f}, {1e3 * late:,.0f}, {1e3 * worst:,.0f} ms ({worst / mean:.1f}x)"


if __name__ == "__main__":
    main()
