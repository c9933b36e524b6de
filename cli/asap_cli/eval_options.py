"""The options of an evaluation, on a server and on this machine alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from asap.errors import InvalidInput

__all__ = [
    "Benchmarks",
    "Budgets",
    "Extractions",
    "Limit",
    "Preset",
    "Samples",
    "Temperature",
    "eval_values",
]

Benchmarks = Annotated[
    list[str] | None,
    typer.Option(
        "--benchmark",
        metavar="NAME,…",
        help="humaneval, humaneval-plus, livecodebench-v1-v3, livecodebench-v4-v5, leetcode, "
        "mbpp-plus, or a file's name \\[default: humaneval,humaneval-plus].",
    ),
]
Budgets = Annotated[
    str | None,
    typer.Option(
        "--budget", metavar="N,…", help="Tokens of thinking and answer \\[default: the paper's]."
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="The first N tasks of each benchmark.")]
Samples = Annotated[
    int | None, typer.Option(min=1, help="Completions of each task, with --temperature.")
]
Temperature = Annotated[float | None, typer.Option(min=0, help="Of sampling \\[default: greedy].")]
Extractions = Annotated[
    str | None,
    typer.Option(
        "--extraction",
        metavar="NAME,…",
        help="strict (code of the answer alone), lenient (as the authors' scripts) or both.",
    ),
]
Preset = Annotated[str, typer.Option(help="default, paper, or demo: a few tasks on a CPU.")]


def eval_values(
    benchmarks: Sequence[str] | None,
    budgets: str | None,
    limit: int | None,
    samples: int | None,
    temperature: float | None,
    extractions: str | None,
    preset: str | None,
) -> dict[str, object]:
    """Fields of EvalConfig, None where nothing was asked for."""
    names = [name for given in benchmarks or () for name in _words(given)]
    return {
        "preset": preset,
        "benchmarks": names or None,
        "budgets": None if budgets is None else [_tokens(word) for word in _words(budgets)],
        "limit": limit,
        "samples": samples,
        "temperature": temperature,
        "extractions": None if extractions is None else _words(extractions),
    }


def _words(text: str) -> list[str]:
    return [word for part in text.split(",") if (word := part.strip())]


def _tokens(word: str) -> int:
    """`6k` is 6,144 tokens, as in the paper."""
    number, factor = (word[:-1], 1024) if word[-1] in "kK" else (word, 1)
    if not number.isdecimal():
        raise InvalidInput(f"--budget: expected numbers of tokens such as 4096 or 4k, not {word!r}")
    return int(number) * factor
