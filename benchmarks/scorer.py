"""The scorer against the straightforward way and against vLLM: `python benchmarks/scorer.py`.

Reference: one trace at a time, logits of all positions, log-softmax over the whole vocabulary, the
growing prefix tokenised again for every step and the kept text again after every removal. vLLM,
where installed: `prompt_logprobs` of all traces at once, in process, without prefix caching. Ours:
one tokenisation, traces packed without padding, the output head on the needed rows, additive
counts. Same text, same random weights, same type; each case runs in a process of its own, so that
its peak of memory is its own. `share` is the rate of the operations that are needed over that of
one large matrix product, measured in the same process. `--cases naive-rounds rounds`: iterative
pruning, re-scored without and with what the last round left. On a GPU:
`--device cuda --shape 7b`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from report import show, traces
from transformers import Qwen2Config, Qwen2ForCausalLM

from asap.config import PruneConfig
from asap.fine import fine_prune
from asap.ports import ScoreRequest
from asap.selection import remove_lowest
from asap.steps import SEPARATOR, join_steps, split_steps
from asap.types import Record, Triple
from asap_runtime.demo_model import demo_directory
from asap_surprisal.loading import causal_lm
from asap_surprisal.memory import free_bytes
from asap_surprisal.metering import PassCost, peak_rate
from asap_surprisal.scorer import TorchScorer
from asap_surprisal.tokenization import HFTokenCounter

VOCABULARY = 152_064
WINDOW = 32_768
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
WORK = ("1024", "4096", "16384", "real", "alike")
GB = 1e9
FIRST = ("first_token_surprisal",)

Trace = tuple[str, tuple[str, ...]]
Scores = list[list[float | None]]
Case = Callable[[Any, HFTokenCounter, Sequence[Trace]], Scores]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--work", nargs="+", default=WORK, help="tokens of one trace, `real` or `alike`"
    )
    parser.add_argument("--traces", type=int, default=16, help="how many real traces")
    parser.add_argument("--runs", type=int, default=2, help="the fastest one counts")
    parser.add_argument(
        "--cases", nargs="+", choices=tuple(CASES), default=("reference", "vllm", "ours")
    )
    parser.add_argument("--case", choices=tuple(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    if options.case:
        print(json.dumps(measure(options)), flush=True)
        return
    cases = [case for case in options.cases if case != "vllm" or find_spec("vllm")]
    rows = [row for work in options.work for row in compare(options, cases, work)]
    show(
        f"Qwen2 {options.shape}, {options.device}, {options.dtype}, vocabulary {VOCABULARY:,}",
        ("work", "case", "tokens/s", "traces/s", "memory GB", "share", "speed-up", "difference"),
        rows,
    )


def compare(options: argparse.Namespace, cases: Sequence[str], work: str) -> list[list[object]]:
    """One line for each case. Memory is what a case needs beyond the loaded model."""
    first, rows = None, []
    for case in cases:
        if case == "reference" and (short := too_long(options, work)):
            rows.append([work, case, short, *[""] * 5])
            continue
        found = run_case(options, case, work)
        first = first or found
        pairs = zip(chain(*first["scores"]), chain(*found["scores"]), strict=True)
        memory = found["gigabytes"]
        rows.append(
            [
                f"{work}: {found['traces']} x {found['tokens'] // found['traces']}",
                case,
                f"{found['tokens'] / found['seconds']:,.0f}",
                f"{found['traces'] / found['seconds']:.2f}",
                "preallocated" if case == "vllm" else f"{memory:.2f}",
                f"{found['share']:.0%}",
                f"{first['seconds'] / found['seconds']:.1f}x",
                f"{max(abs(a - b) for a, b in pairs):.0e}",
            ]
        )
    return rows


def too_long(options: argparse.Namespace, work: str) -> str | None:
    """Why the reference is left out: logits and log-softmax of one trace are its memory."""
    if not work.isdigit():
        return None
    needed = 2 * int(work) * VOCABULARY * (4 if options.dtype == "float32" else 2)
    free = free_bytes(torch.device(options.device))
    if needed <= 0.75 * free:
        return None
    return f"needs {needed / GB:.0f} of {free / GB:.0f} GB"


def run_case(options: argparse.Namespace, case: str, work: str) -> dict[str, Any]:
    """`measure` in a new process."""
    command = [sys.executable, __file__, "--case", case, "--work", work]
    for name in ("device", "shape", "dtype", "traces", "runs"):
        command += [f"--{name}", str(getattr(options, name))]
    # vLLM prints, too, and may abort while it ends: what counts is our line
    output = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True).stdout
    line = next((line for line in output.splitlines() if line.startswith('{"seconds"')), None)
    if line is None:
        raise RuntimeError(f"the case {case!r} failed; its reason is above")
    result: dict[str, Any] = json.loads(line)
    return result


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds, peak memory beyond the model, and scores of one case."""
    [work], device = options.work, options.device
    counter = HFTokenCounter.load("demo")
    counter.max_length = None  # that of the demo model, which does not run here
    if work == "real":
        todo = real_traces(counter, options.traces)
    elif work == "alike":
        todo = alike_traces(counter)
    else:
        todo = [trace_of(counter, int(work))]
    model = build_model(options.shape, device, getattr(torch, options.dtype))
    lengths = [counter.count(f"{q}\n<think>\n{join_steps(steps)}") for q, steps in todo]
    cost = PassCost.of(model.base_model, model.get_output_embeddings(), whole=False)
    needed = sum(
        cost.operations(whole=n, reused=0, positions=len(steps))
        for n, (_, steps) in zip(lengths, todo, strict=True)
    )
    rate = peak_rate(torch.device(device), model.dtype)
    case = CASES[options.case](model, counter)
    case(model, counter, [(todo[0][0], todo[0][1][:8])])  # warm-up
    before, seconds = peak_bytes(device), []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for _ in range(options.runs):
        started = time.perf_counter()
        scores = case(model, counter, todo)
        seconds.append(time.perf_counter() - started)
    return {
        "seconds": min(seconds),
        "traces": len(todo),
        "tokens": sum(lengths),
        "gigabytes": (peak_bytes(device) - before) / GB,
        "share": needed / min(seconds) / rate,
        "scores": scores,
    }


def reference(_model: Any, _counter: HFTokenCounter) -> Case:
    """One trace at a time."""
    return lambda model, counter, todo: [reference_scores(model, counter, *one) for one in todo]


@torch.inference_mode()
def reference_scores(
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


def ours(model: Any, counter: HFTokenCounter) -> Case:
    """`TorchScorer` with the batch that it chooses."""
    parts = causal_lm(model)
    scorer = TorchScorer("random", parts, counter, max_batch_tokens=parts.budget.batch)

    def case(_model: Any, _counter: HFTokenCounter, todo: Sequence[Trace]) -> Scores:
        found = scorer.score_batch(
            [ScoreRequest(question, steps, FIRST) for question, steps in todo]
        )
        for one in found:
            scores = one.scores["first_token_surprisal"]
            remove_lowest(scores, one.tokens, one.tokens_joined, max_tokens=one.total // 2)
        return [list(one.scores["first_token_surprisal"]) for one in found]

    return case


def vllm(model: Any, counter: HFTokenCounter) -> Case:
    """The batching of vLLM; positions as the remote scorer finds them."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    from vllm import LLM, SamplingParams

    folder = Path(tempfile.mkdtemp())
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_directory() / name, folder)
    dtype = str(model.dtype).removeprefix("torch.")
    engine = LLM(
        str(folder), dtype=dtype, max_model_len=WINDOW, enforce_eager=True,
        enable_prefix_caching=False, disable_log_stats=True, seed=0,
    )  # fmt: skip
    shutil.rmtree(folder)
    planner = TorchScorer("plans", causal_lm(model), counter)
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)

    def case(_model: Any, _counter: HFTokenCounter, todo: Sequence[Trace]) -> Scores:
        rows = [
            planner.prepare(ScoreRequest(question, steps, FIRST)).plan.rows[0]
            for question, steps in todo
        ]
        prompts = [{"prompt_token_ids": [*row.ids, row.targets[-1]]} for row in rows]
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        return [
            [
                -output.prompt_logprobs[position + 1][target].logprob
                for position, target in zip(row.positions, row.targets, strict=True)
            ]
            for row, output in zip(rows, outputs, strict=True)
        ]

    return case


def rounds(model: Any, counter: HFTokenCounter, *, keep: bool = True) -> Case:
    """Iterative pruning to half of the steps; the order of removal is compared."""
    kept = 10**6 if keep else 0
    scorer = TorchScorer("random", causal_lm(model), counter, max_kept_tokens=kept)
    config = PruneConfig(method="asap_stage2", mode="iterative", step_ratio=0.5, max_tokens=None)

    def case(_model: Any, _counter: HFTokenCounter, todo: Sequence[Trace]) -> Scores:
        records = [
            Record(
                triple=Triple(id="x", question=question, cot=join_steps(steps), answer="x"),
                config=config,
            )
            for question, steps in todo
        ]
        done = asyncio.run(fine_prune(records, scorer))
        return [[float(i) for i in one.fine.removed] for one in done if one.fine]

    return case


CASES: dict[str, Callable[[Any, HFTokenCounter], Case]] = {
    "reference": reference,
    "vllm": vllm,
    "ours": ours,
    "rounds": rounds,
    "naive-rounds": lambda model, counter: rounds(model, counter, keep=False),
}


def build_model(shape: str, device: str, dtype: torch.dtype) -> Any:
    """Random weights, the same for all cases."""
    config = Qwen2Config(vocab_size=VOCABULARY, max_position_embeddings=WINDOW, **SHAPES[shape])
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model: Any = Qwen2ForCausalLM(config)  # type: ignore[no-untyped-call]
        torch.set_default_dtype(torch.float32)
    return model.eval()


def real_traces(counter: HFTokenCounter, size: int) -> list[Trace]:
    """A fixed sample of the real traces, lengths as they come."""
    rows = [row for name in ("cot_code", "cot_math") for row in traces(name)]
    sample = random.Random(0).sample(rows, min(size, len(rows)))
    found = [(row["question"], tuple(split_steps(row["cot"]))) for row in sample]
    return [(q, steps) for q, steps in found if counter.count(q + join_steps(steps)) < WINDOW - 100]


def alike_traces(counter: HFTokenCounter) -> list[Trace]:
    """Eight CoTs of one question, each about as long as it: 1,000 tokens."""
    _, steps = trace_of(counter, 9 * 1024)
    size = len(steps) // 9
    question, *cots = (steps[at : at + size] for at in range(0, 9 * size, size))
    return [(join_steps(question), cot) for cot in cots]


def trace_of(counter: HFTokenCounter, tokens: int) -> Trace:
    """A question and real steps, of `tokens` tokens or just under that."""
    records = traces()
    steps: list[str] = []
    left = tokens - counter.count(records[0]["question"]) - 10
    for record in reversed(records * 4):
        for step in split_steps(record["cot"]):
            left -= counter.count(step + SEPARATOR)
            if left < 0:
                return records[0]["question"], tuple(steps)
            steps.append(step)
    raise ValueError(f"the traces hold fewer than {tokens} tokens")


def peak_bytes(device: str) -> int:
    """Highest memory so far, of the process or on the GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
