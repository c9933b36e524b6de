"""What an evaluation is: benchmarks, budgets, sampling, extraction, and its presets. Travels with
the run, never read from the environment.

The defaults are the paper's protocol (§4.1: greedy, one completion, one budget for thinking and
answer) with code taken from the answer alone; `paper` takes it as the authors' scripts do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from asap.train_config import TemplateName

__all__ = ["BENCHMARKS", "EVAL_PRESETS", "Benchmark", "EvalConfig", "Extraction", "benchmark_of"]

Extraction = Literal["strict", "lenient"]
K = 1024
"""The paper's: at "2K" it reports a mean of 2,028 tokens."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What the paper does with a benchmark, or what stands for it where the paper does not."""

    title: str
    tasks: int | None
    """Tasks of the whole benchmark; None when it is not known beforehand."""
    budget: int
    """Generated tokens at most (§4.1)."""
    sweep: tuple[int, ...] = ()
    """Budgets of the sweeps (Tables 9 to 11)."""


_LONG = tuple(K * n for n in (2, 4, 6, 8, 10, 12))
_SHORT = tuple(K * n for n in (1, 2, 4, 6))
BENCHMARKS: dict[str, Benchmark] = {
    "humaneval": Benchmark("HumanEval", 164, 6 * K, _SHORT),
    "humaneval-plus": Benchmark("HumanEval+", 164, 6 * K, _SHORT),
    "livecodebench-v1-v3": Benchmark("LiveCodeBench v1_v3", 612, 10 * K, _LONG),
    "livecodebench-v4-v5": Benchmark("LiveCodeBench v4_v5", 268, 10 * K, _LONG),
    "leetcode": Benchmark("LeetCodeDataset", 228, 10 * K, _LONG),
    "mbpp-plus": Benchmark("MBPP+", 378, 6 * K),
}
"""The paper's five, in its order, and MBPP+, which it does not use."""


def benchmark_of(name: str) -> Benchmark:
    """The row of `BENCHMARKS`, or that of an unknown benchmark."""
    return BENCHMARKS.get(name, Benchmark(name, None, 10 * K))


class EvalConfig(BaseModel):
    """Every knob of an evaluation."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )

    preset: Literal["default", "paper", "demo"] = "default"
    benchmarks: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        ("humaneval", "humaneval-plus"), min_length=1
    )
    """Rows of `BENCHMARKS`, or names of the caller's own data."""
    limit: int | None = Field(None, ge=1)
    """So many tasks of each benchmark, the first of its file; None: all of them."""

    # Generation (§4.1)
    budgets: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(None, min_length=1)
    """Tokens of thinking and answer together; None: the benchmark's own, 6K or 10K."""
    samples: int = Field(1, ge=1, le=1000)
    """Completions of each task at each budget."""
    temperature: float = Field(0.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = Field(0, ge=0)
    """Completion number n is drawn with seed + n."""
    template: TemplateName | Literal["server"] = "server"
    """Who turns the question into a prompt: the server's chat template, or ours, the form that the
    model was trained on, which ends in the opening tag.
    """

    # Grading
    extractions: tuple[Extraction, ...] = Field(("strict", "lenient"), min_length=1)
    """How code is taken from a completion; every one is reported, the first is the main one."""
    add_imports: bool = True
    """Put the import lines of the task before a program that lacks them."""
    time_limit_s: float | None = Field(None, gt=0)
    """Seconds of CPU for all tests of a task, or for each case; None: the benchmark's own. Below 5
    they are 5: verdicts must not depend on the machine.
    """

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {**EVAL_PRESETS.get(str(values.get("preset", "default")), {}), **values}

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        for name in ("benchmarks", "budgets", "extractions"):
            values = getattr(self, name) or ()
            if len(set(values)) != len(values):
                raise ValueError(f"{name} names the same value twice")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("several samples at temperature 0 are all the same; give one")
        return self

    def budgets_of(self, benchmark: str) -> tuple[int, ...]:
        """The given budgets, or that of the benchmark, in tokens."""
        return self.budgets or (benchmark_of(benchmark).budget,)

    def hash(self) -> str:
        """SHA-256 over the canonical JSON of all values."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()


EVAL_PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "benchmarks": (
            "humaneval",
            "humaneval-plus",
            "livecodebench-v1-v3",
            "livecodebench-v4-v5",
            "leetcode",
        ),
        "template": "deepseek-r1",
        "extractions": ("lenient", "strict"),
        "add_imports": False,
    },
    "demo": {"benchmarks": ("humaneval",), "limit": 8, "budgets": (128, 256)},
}
"""What each preset changes against the defaults above; explicit values win over the preset."""
