"""What a model reached on a benchmark: Acc, Tok and Lat as the paper prints them, and what stands
behind them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pydantic import Field

from asap.eval_config import Extraction
from asap.eval_items import EvalItem
from asap.extraction import ends_in_loop
from asap.grades import Verdict
from asap.significance import Interval, bootstrap_mean
from asap.types import Frozen

__all__ = [
    "Generation",
    "MetricsRow",
    "Result",
    "by_task",
    "generation_seconds",
    "kept_ratio",
    "measure",
    "pass_at_k",
    "percentile",
    "results_of",
    "shared_seconds",
]

PASS_AT = (1, 5, 10, 100)

Generation = tuple[str, int, int, float, float]
"""Task id, budget, number, start and seconds of a completion: the same for all its results."""


@dataclass(frozen=True, slots=True)
class Result:
    """One completion and what came of it, without its text. Times in seconds."""

    benchmark: str
    task_id: str
    budget: int
    number: int
    extraction: Extraction
    verdict: Verdict | None
    """None: not graded yet."""
    tokens: int
    truncated: bool
    loop: bool
    flags: tuple[str, ...]
    started_at: float
    seconds: float
    ttft_s: float | None = None

    @property
    def generation(self) -> Generation:
        """Which completion it is of."""
        return self.task_id, self.budget, self.number, self.started_at, self.seconds

    @property
    def per_token_s(self) -> float | None:
        """Mean time between two tokens behind the first; None when nobody knows."""
        if self.ttft_s is None or self.tokens < 2:
            return None
        return max(0.0, self.seconds - self.ttft_s) / (self.tokens - 1)

    @property
    def scored(self) -> bool:
        """Whether the verdict is about the program; trouble of the sandbox is not."""
        return self.verdict not in (None, "sandbox-trouble")

    @property
    def passed(self) -> bool:
        """Whether the program passed all tests."""
        return self.verdict == "passed"


def results_of(item: EvalItem) -> Iterator[Result]:
    """The item's completions, each once for every benchmark and extraction."""
    grades = {(g.benchmark, g.extraction, g.budget, g.number): g.grade for g in item.grades}
    for sample in item.samples:
        loop = ends_in_loop(sample.text)
        for problem in item.problems:
            for extraction in item.config.extractions:
                key = (problem.benchmark, extraction, sample.budget, sample.number)
                grade = grades.get(key)
                yield Result(
                    benchmark=problem.benchmark,
                    task_id=problem.task_id,
                    budget=sample.budget,
                    number=sample.number,
                    extraction=extraction,
                    verdict=grade.verdict if grade else None,
                    tokens=sample.completion_tokens,
                    truncated=sample.truncated,
                    loop=loop,
                    flags=grade.flags if grade else (),
                    started_at=sample.started_at,
                    seconds=sample.seconds,
                    ttft_s=sample.ttft_s,
                )


class MetricsRow(Frozen):
    """A model on a benchmark at one budget. Shares are parts of all completions, in 0 to 1."""

    model: str
    benchmark: str
    budget: int
    extraction: Extraction
    tasks: int
    """With at least one scored completion."""
    samples: int
    unscored: int
    """Completions without a verdict about the program; not part of the accuracy."""
    passed: int
    """Completions; with one for each task these are the solved tasks."""
    accuracy: float
    """Acc: mean over the tasks of their share of passed completions, in percent (pass@1)."""
    interval: Interval | None
    """Of the accuracy, over tasks; None without a scored task."""
    pass_at: dict[int, float] = Field(default_factory=dict)
    """k to the unbiased pass@k in percent, where each task has k completions."""
    tokens: float
    """Tok: mean generated tokens of a completion."""
    latency_batch_s: float
    """Lat: seconds in which requests ran, for each completion (inverse throughput). Those in which
    several ran, of other budgets and benchmarks, too, are divided between them.
    """
    concurrency: float
    """Mean requests at a time while any ran; at 1 the latencies below are those of one user."""
    latency_p50_s: float
    latency_p95_s: float
    ttft_p50_s: float | None
    """To the first token; None when nothing was streamed."""
    ttft_p95_s: float | None
    per_token_p50_s: float | None
    """Between two tokens behind the first, the mean of each completion."""
    per_token_p95_s: float | None
    truncated: float
    """Ended by the budget."""
    no_code: float
    """Without a program."""
    timeouts: float
    loops: float
    """Ended in one text repeated over and over."""
    flagged: int
    """Completions whose program touches what graders have been fooled with."""
    flipped: int
    """Completions whose time-out went otherwise when it was run once more."""

    @property
    def cell(self) -> str:
        """Acc, Tok and Lat as the paper prints them, such as `84.15/2464/0.98`."""
        return f"{self.accuracy:.2f}/{self.tokens:.0f}/{self.latency_batch_s:.2f}"


def measure(
    model: str,
    results: Sequence[Result],
    *,
    seed: int = 0,
    seconds_of: Mapping[Generation, float] | None = None,
) -> MetricsRow:
    """The row of one or more results of one benchmark, budget and extraction. `seconds_of`:
    `generation_seconds` of all that ran beside them; None: nothing else did.
    """
    seconds_of = generation_seconds(results) if seconds_of is None else seconds_of
    first, count = results[0], len(results)
    scored = [r for r in results if r.scored]
    tasks = [[r.passed for r in group] for group in by_task(scored).values()]
    shares = [100 * sum(passed) / len(passed) for passed in tasks]
    busy = math.fsum(seconds_of[r.generation] for r in results)
    seconds = sorted(r.seconds for r in results)
    ttft = sorted(r.ttft_s for r in results if r.ttft_s is not None)
    gaps = sorted(gap for r in results if (gap := r.per_token_s) is not None)
    fewest = min(map(len, tasks), default=0)

    def share(holds: Iterable[bool]) -> float:
        return sum(holds) / count

    return MetricsRow(
        model=model,
        benchmark=first.benchmark,
        budget=first.budget,
        extraction=first.extraction,
        tasks=len(tasks),
        samples=count,
        unscored=count - len(scored),
        passed=sum(map(sum, tasks)),
        accuracy=math.fsum(shares) / len(shares) if shares else 0.0,
        interval=bootstrap_mean(shares, seed=seed) if shares else None,
        pass_at={
            k: 100 * math.fsum(pass_at_k(len(t), sum(t), k) for t in tasks) / len(tasks)
            for k in PASS_AT
            if k <= fewest
        },
        tokens=sum(r.tokens for r in results) / count,
        latency_batch_s=busy / count,
        concurrency=math.fsum(seconds) / busy if busy else 0.0,
        latency_p50_s=percentile(seconds, 0.50),
        latency_p95_s=percentile(seconds, 0.95),
        ttft_p50_s=percentile(ttft, 0.50) if ttft else None,
        ttft_p95_s=percentile(ttft, 0.95) if ttft else None,
        per_token_p50_s=percentile(gaps, 0.50) if gaps else None,
        per_token_p95_s=percentile(gaps, 0.95) if gaps else None,
        truncated=share(r.truncated for r in results),
        no_code=share(r.verdict == "no-code" for r in results),
        timeouts=share(r.verdict == "timeout" for r in results),
        loops=share(r.loop for r in results),
        flagged=sum(any(f.startswith("uses:") for f in r.flags) for r in results),
        flipped=sum("flipped" in r.flags for r in results),
    )


def by_task(results: Iterable[Result]) -> dict[str, list[Result]]:
    """The results of each task, by sample number; tasks in the order of their ids."""
    groups: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda r: (r.task_id, r.number)):
        groups.setdefault(result.task_id, []).append(result)
    return groups


def pass_at_k(n: int, passed: int, k: int) -> float:
    """Unbiased chance that one of k out of n completions passes, `passed` of which do; k <= n."""
    return 1 - math.comb(n - passed, k) / math.comb(n, k)


def kept_ratio(kept: float, original: float) -> float:
    """The kept part of the tokens; 0.244 where the paper writes -75.6 %."""
    return kept / original if original else 1.0


def generation_seconds(results: Iterable[Result]) -> dict[Generation, float]:
    """The seconds of each completion, shared with those that ran at the same time."""
    ran = sorted({result.generation for result in results})
    shares = shared_seconds([(start, seconds) for *_, start, seconds in ran])
    return dict(zip(ran, shares, strict=True))


def shared_seconds(spans: Sequence[tuple[float, float]]) -> list[float]:
    """Of each (start, seconds) its part of the time, where a moment in which several run is divided
    between them. All parts together are the length of the union: a pause does not count.
    """
    changes: Counter[float] = Counter()
    for start, seconds in spans:
        changes[start] += 1
        changes[start + seconds] -= 1
    passed, running, last, until = 0.0, 0, 0.0, {}
    for moment in sorted(changes):
        passed += (moment - last) / running if running else 0.0
        running += changes[moment]
        until[moment], last = passed, moment
    return [until[start + seconds] - until[start] for start, seconds in spans]


def percentile(ordered: Sequence[float], share: float) -> float:
    """Nearest rank in a non-empty, ascending sequence."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
