"""The scorer against the straightforward way: `python benchmarks/scorer.py`.

Reference: one trace at a time, logits of all positions, log-softmax over the whole vocabulary, the
growing prefix tokenised again for every step and the kept text again after every removal. Ours: one
tokenisation, the output head on the needed rows, additive counts. Same text, same random weights,
same type; each case runs in a process of its own, so that its peak of memory is its own. On a GPU:
`--device cuda --shape 7b`. `share` is our rate over that of one large matrix product.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from asap.ports import ScoreRequest
from asap.selection import remove_lowest
from asap.steps import SEPARATOR, join_steps, split_steps
from asap_surprisal.forward import CausalLM, float32_head
from asap_surprisal.scorer import TorchScorer
from asap_surprisal.tokenization import HFTokenCounter

TRACES = Path(__file__).parent.parent / "examples" / "triples.jsonl"
VOCABULARY = 152_064
SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
}
SIZES = (2048, 4096, 8192, 16384)
RUNS = 2  # the faster one counts
GB = 1e9

Case = Callable[[Any, HFTokenCounter, str, tuple[str, ...]], list[float | None]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--tokens", type=int, nargs="+", default=SIZES)
    parser.add_argument("--case", choices=tuple(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    if options.case:
        print(json.dumps(measure(options)))
        return
    print(f"Qwen2 {options.shape}, {options.device}, {options.dtype}, vocabulary {VOCABULARY:,}")
    print(
        "tokens steps |  reference       ours   ratio |  reference       ours   ratio | share  diff"
    )
    for tokens in options.tokens:
        print(compare(options, tokens), flush=True)


def compare(options: argparse.Namespace, tokens: int) -> str:
    """One line of the table. Memory is what a case needs beyond the loaded model."""
    ours = run_case(options, "ours", tokens)
    needed = (
        2 * tokens * VOCABULARY * (4 if options.dtype == "float32" else 2)
    )  # logits, log-softmax
    free = free_bytes(options.device)
    head = f"{tokens:6d} {len(ours['scores']):5d}"
    if needed > 0.75 * free:
        reason = f"reference left out: needs {needed / GB:.0f} GB of {free / GB:.0f} GB free"
        return f"{head} | {ours['seconds']:.2f} s, {ours['gigabytes']:.2f} GB | {reason}"
    reference = run_case(options, "reference", tokens)
    pairs = zip(reference["scores"], ours["scores"], strict=True)
    difference = max(abs(a - b) for a, b in pairs)
    cells = [
        f"{reference[what]:8.2f} {unit} {ours[what]:8.2f} {unit} "
        f"{reference[what] / max(ours[what], 0.01):6.1f}x"
        for what, unit in (("seconds", "s"), ("gigabytes", "GB"))
    ]
    return f"{head} | {' | '.join(cells)} | {ours['share']:5.0%} {difference:.0e}"


def run_case(options: argparse.Namespace, case: str, tokens: int) -> dict[str, Any]:
    """`measure` in a new process."""
    command = [sys.executable, __file__, "--case", case, "--tokens", str(tokens)]
    for name in ("device", "shape", "dtype"):
        command += [f"--{name}", getattr(options, name)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(output)
    return result


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds, peak memory beyond the model, and scores of one case."""
    [tokens], device = options.tokens, options.device
    case, counter = CASES[options.case], HFTokenCounter.load("demo")
    counter.max_length = None  # that of the demo model, which does not run here
    model = build_model(options.shape, device, getattr(torch, options.dtype))
    question, steps = trace_of(counter, tokens)
    case(model, counter, question, steps[:8])  # warm-up
    before, seconds = peak_bytes(device), []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for _ in range(RUNS):
        started = time.perf_counter()
        scores = case(model, counter, question, steps)
        seconds.append(time.perf_counter() - started)
    peak = peak_bytes(device)
    rate = operations(model.config, tokens) / min(seconds) / matmul_rate(device, model.dtype)
    return {
        "seconds": min(seconds),
        "gigabytes": (peak - before) / GB,
        "share": rate,
        "scores": scores,
    }


@torch.inference_mode()
def score_reference(
    model: Any, counter: HFTokenCounter, question: str, steps: tuple[str, ...]
) -> list[float | None]:
    text = f"{question}\n<think>\n"
    ids = [counter.bos_id, *counter.encode(text + join_steps(steps)).ids]
    logits = model(torch.tensor([ids], device=model.device), use_cache=False).logits
    log_p = torch.log_softmax(logits, dim=-1)
    scores = []
    for step in steps:
        first = len(counter.encode(text).ids) + 1
        scores.append(-log_p[0, first - 1, ids[first]].item())
        text += step + SEPARATOR
    kept = list(range(len(steps)))
    budget = len(counter.encode(join_steps(steps)).ids) // 2
    for at in sorted(kept, key=scores.__getitem__):
        if len(counter.encode(join_steps([steps[i] for i in kept])).ids) <= budget:
            break
        kept.remove(at)
    return list(scores)


def score_ours(
    model: Any, counter: HFTokenCounter, question: str, steps: tuple[str, ...]
) -> list[float | None]:
    parts = CausalLM(model.base_model, float32_head(model.get_output_embeddings()), model.device)
    scorer = TorchScorer("random", parts, counter)
    [scored] = scorer.score_batch([ScoreRequest(question, steps, ("first_token_surprisal",))])
    scores = scored.scores["first_token_surprisal"]
    remove_lowest(scores, scored.tokens, scored.tokens_joined, max_tokens=scored.total // 2)
    return list(scores)


CASES: dict[str, Case] = {"reference": score_reference, "ours": score_ours}


def build_model(shape: str, device: str, dtype: torch.dtype) -> Any:
    """Random weights, the same for both cases."""
    config = Qwen2Config(vocab_size=VOCABULARY, max_position_embeddings=32768, **SHAPES[shape])
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model: Any = Qwen2ForCausalLM(config)  # type: ignore[no-untyped-call]
        torch.set_default_dtype(torch.float32)
    return model.eval()


def trace_of(counter: HFTokenCounter, tokens: int) -> tuple[str, tuple[str, ...]]:
    """A question and real steps, of `tokens` tokens or just under that."""
    records = [json.loads(line) for line in TRACES.read_text(encoding="utf-8").splitlines()]
    steps: list[str] = []
    left = tokens - counter.count(records[0]["question"]) - 10
    for record in reversed(records * 4):
        for step in split_steps(record["cot"]):
            left -= counter.count(step + SEPARATOR)
            if left < 0:
                return records[0]["question"], tuple(steps)
            steps.append(step)
    raise ValueError(f"the examples hold fewer than {tokens} tokens")


def operations(config: Any, tokens: int) -> float:
    """Floating-point operations of the backbone: 2 per weight and token, and causal attention."""
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    shared = config.num_key_value_heads / config.num_attention_heads
    weights = layers * (width * width * (2 + 2 * shared) + 3 * width * inner)
    return float(2 * weights * tokens + 2 * layers * width * tokens**2)


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Operations per second of one large matrix product, measured now."""
    size = 8192 if device == "cuda" else 2048
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(5):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return float(2 * size**3 / best)


def peak_bytes(device: str) -> int:
    """Highest memory so far, of the process or on the GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_bytes(device: str) -> int:
    """Memory that can be had now."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024


if __name__ == "__main__":
    main()
