"""What narrower weights cost: `python benchmarks/precision.py`, on real traces.

Each precision scores the same traces. Against the first one named: Spearman's rank correlation of
the steps' surprisals, mean over the traces, and the share of kept steps that are others at half of
the tokens. `--shape 7b --device cuda` takes random weights of that size: good for memory and speed,
while correlations are those of a trained model only with `--model`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import correlation, fmean

import torch
from report import best_of, show
from scorer import FIRST, GB, SHAPES, build_model, real_traces

from asap.ports import ScoreRequest
from asap.selection import remove_lowest
from asap.types import StepScores
from asap_surprisal.forward import CausalLM
from asap_surprisal.loading import causal_lm, load_model
from asap_surprisal.quantize import to_fp8
from asap_surprisal.scorer import TorchScorer
from asap_surprisal.tokenization import HFTokenCounter

PRECISIONS = ("float32", "bfloat16", "fp8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="hub name or directory")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="instead: random weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--traces", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3, help="the fastest one counts")
    options = parser.parse_args()
    counter = HFTokenCounter.load(options.model)
    if options.shape:
        counter.max_length = None  # that of a model which does not run here
    requests = [ScoreRequest(q, steps, FIRST) for q, steps in real_traces(counter, options.traces)]
    first, rows = None, []
    for precision in options.precisions:
        model = open_model(options, precision)
        scorer = TorchScorer(precision, model, counter, max_batch_tokens=model.budget.batch)
        tokens = sum(scorer.prepare(request).tokens for request in requests)
        seconds, found = best_of(options.runs, lambda: scorer.score_batch(requests))  # noqa: B023
        first = first or found
        rows.append(
            [
                precision,
                f"{weight_bytes(model) / GB:.3f}",
                f"{tokens / seconds:,.0f}",
                f"{fmean(map(rank_correlation, first, found)):.4f}",
                f"{changed(first, found):.2%}",
            ]
        )
        scorer.close()
    show(
        f"{options.shape or options.model}, {options.device}, {len(requests)} traces, "
        f"{sum(len(one.tokens) for one in first or ())} steps, {tokens:,} tokens",
        ("precision", "weights GB", "tokens/s", "rank correlation", "kept steps changed"),
        rows,
    )


def open_model(options: argparse.Namespace, precision: str) -> CausalLM:
    """The model of the options; fp8 computes in bfloat16 on a GPU, else in float32."""
    if not options.shape:
        return load_model(options.model, options.device, precision)  # type: ignore[arg-type]
    wide = "bfloat16" if options.device == "cuda" else "float32"
    dtype = getattr(torch, wide if precision == "fp8" else precision)
    model = build_model(options.shape, options.device, dtype)
    if precision == "fp8":
        to_fp8(model.base_model)
    return causal_lm(model)


def weight_bytes(model: CausalLM) -> int:
    """Of the backbone, its embeddings included; the head stays as it is."""
    return sum(part.nbytes for part in model.backbone.parameters())  # type: ignore[attr-defined]


def rank_correlation(first: StepScores, other: StepScores) -> float:
    """Spearman's, of the steps that have both scores; 1 for fewer than two of them."""
    pairs = zip(*(one.scores["first_token_surprisal"] for one in (first, other)), strict=True)
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    if len(both) < 2:
        return 1.0
    return correlation(*(ranks(values) for values in zip(*both, strict=True)))


def ranks(values: Sequence[float]) -> list[int]:
    """Places in ascending order; equal values in theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    return [place for _, place in sorted(zip(order, range(len(order)), strict=True))]


def changed(first: Sequence[StepScores], found: Sequence[StepScores]) -> float:
    """Share of the steps kept by the first that the other one does not keep."""
    kept = [[set(half(one)) for one in scored] for scored in (first, found)]
    lost = sum(len(a - b) for a, b in zip(*kept, strict=True))
    return lost / sum(map(len, kept[0]))


def half(one: StepScores) -> tuple[int, ...]:
    """Steps that stay at half of the tokens."""
    scores = one.scores["first_token_surprisal"]
    return remove_lowest(scores, one.tokens, one.tokens_joined, max_tokens=one.total // 2).kept


if __name__ == "__main__":
    main()
