"""Training on original against pruned traces: `python benchmarks/trainer.py`.

`asap prune` brings the sample traces, and real ones where they are at hand, to the share of tokens
that Table 3 prints. Then the training process runs once for each case, for one epoch over the same
samples: Unsloth and the plain backend, a sample a row and packed rows. A step holds as many samples
everywhere, as nearly as can be. Speeds leave out the first step, which compiles. `ratio` is seconds
per sample over those of the first line; the paper's lines are its Table 3, whose steps have 16
samples. `--device cuda --shape 7b` takes random weights of that size.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any
from uuid import uuid4

from report import REPOSITORY, data_folder, show, traces
from scorer import GB, SHAPES, VOCABULARY, WINDOW

from asap.paper_tables import TRAINING_TOKENS
from asap.runs import TrainResult, TrainRun
from asap.train_config import TrainConfig
from asap_runtime.blobs import BlobStore
from asap_runtime.demo_model import demo_directory
from asap_runtime.run_files import RunFiles
from asap_trainer.batches import rows_of
from asap_trainer.encoding import HFEncoder, prepare

TINY = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LONGEST = 16_384
SHARE = TRAINING_TOKENS["ASAP"][0] / TRAINING_TOKENS["Original"][0]
"""Of an assistant message's tokens that is left."""
COLUMNS = (
    "data", "backend", "rows", "tokens a sample", "with loss", "tokens/s", "s/step", "s/sample",
    "ratio", "MFU", "GB",
)  # fmt: skip
PAPER_STEP = 16
"""Samples in a step of the paper's."""


@dataclass(frozen=True)
class Data:
    """The same samples, original and pruned."""

    name: str
    files: dict[str, Path]
    lengths: dict[str, list[int]]
    """Training tokens of each sample."""
    longest: int


@dataclass(frozen=True)
class Measured:
    """One run; seconds of the steps behind the first."""

    result: TrainResult
    tokens_per_s: float
    step_s: float
    mfu: float

    @property
    def sample_s(self) -> float:
        """Seconds for a sample of mean length."""
        return self.result.tokens_per_sample / self.tokens_per_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=("tiny", "demo", "7b"))
    parser.add_argument("--work", nargs="+", choices=("examples", "real"))
    parser.add_argument("--samples", type=int, default=48, help="of each data set")
    parser.add_argument("--accumulation", type=int, help="samples in a step; the paper's is 16")
    parser.add_argument("--backends", nargs="+", choices=("unsloth", "plain"))
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    options.shape = options.shape or ("7b" if on_gpu else "demo")
    options.accumulation = options.accumulation or (16 if on_gpu else 4)
    works = options.work or (["examples", "real"] if data_folder() else ["examples"])
    backends = options.backends or ["unsloth", "plain"]
    if find_spec("unsloth") is None:
        backends.remove("unsloth")
        print("skipped: Unsloth is not installed")
    with tempfile.TemporaryDirectory() as folder:
        base = build_base(options.shape, Path(folder, "base"))
        for work in works:
            data = prepare_data(work, options.samples, Path(folder))
            count = len(data.lengths["original"])
            show(
                f"{options.shape}, {options.device}; {count} samples ({work}), one epoch in steps "
                f"of {options.accumulation}, up to {data.longest:,} tokens",
                COLUMNS,
                [*compare(options, data, backends, base), *paper()],
            )


def build_base(shape: str, folder: Path) -> Path:
    """A base model with the demo's tokenizer and room for long samples."""
    shutil.copytree(demo_directory(), folder, ignore=shutil.ignore_patterns("__py*", "*.py"))
    path = folder / "config.json"
    if shape == "demo":
        config = {**json.loads(path.read_text()), "max_position_embeddings": WINDOW}
        path.write_text(json.dumps(config))
        return folder
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {**SHAPES["7b"], "vocab_size": VOCABULARY} if shape == "7b" else TINY
    given = {"vocab_size": 4096, "max_position_embeddings": WINDOW, "bos_token_id": 0} | sizes
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    Qwen2ForCausalLM(Qwen2Config(**given)).save_pretrained(folder)  # type: ignore[no-untyped-call]
    torch.set_default_dtype(torch.float32)
    return folder


def prepare_data(work: str, size: int, folder: Path) -> Data:
    """Traces that fit the paper's length, as they are and pruned by the command line."""
    encoder = HFEncoder.load("demo")
    rows = examples() if work == "examples" else [*traces("cot_code"), *traces("cot_math")]
    random.Random(0).shuffle(rows)
    original, pruned = folder / f"{work}.jsonl", folder / f"{work}-pruned.jsonl"
    original.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = TrainConfig(max_seq_length=LONGEST)
    kept = set(prepare([original], config, "demo", folder / "tokens").train.ids)
    rows = [row for row in rows if row["id"] in kept][:size]
    original.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    cot, answer = (
        fmean(len(encoder.encode(row[field]).ids) for row in rows) for field in ("cot", "answer")
    )
    # Answers are not pruned, so the thinking has to give more.
    keep = max(0.05, (SHARE * (cot + answer) - answer) / cot)
    command = [sys.executable, "-m", "asap_cli.main", "prune", str(original), "-o", str(pruned)]
    command += [
        "--anchor",
        "extractive",
        "--scorer",
        "demo",
        "--keep-ratio",
        f"{keep:.4f}",
        "--yes",
    ]
    subprocess.run(command, check=True, capture_output=True)
    files = {"original": original, "pruned": pruned}
    lengths = {
        kind: [int(n) for n in prepare([file], config, "demo", folder / "tokens").train.tokens]
        for kind, file in files.items()
    }
    return Data(work, files, lengths, max(lengths["original"]))


def examples() -> list[dict[str, Any]]:
    """The sample traces of the repository."""
    lines = (REPOSITORY / "examples" / "triples.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def compare(
    options: argparse.Namespace, data: Data, backends: Sequence[str], base: Path
) -> Iterator[list[object]]:
    """One line for each case."""
    first: Measured | None = None
    for backend, packing, kind in product(backends, (False, True), ("original", "pruned")):
        lengths, accumulation = data.lengths[kind], options.accumulation
        if packing:  # as many samples in a step, as nearly as can be
            packed = rows_of(lengths, data.longest, packing=True)
            accumulation = max(1, round(accumulation * len(packed) / len(lengths)))
        config = TrainConfig.model_validate(
            {
                **({} if options.device == "cuda" else {"preset": "demo", "held_out_share": 0.0}),
                "backend": backend,
                "packing": packing,
                "accumulation": accumulation,
                "max_seq_length": data.longest,
                "max_steps": None,
                "epochs": 1,
                "log_every": 1,
                "save_every": 10**6,
            }
        )
        found = train(config, data, kind, base)
        label = [kind, backend, "packed" if packing else "single"]
        if isinstance(found, str):
            yield [*label, found, *[""] * (len(COLUMNS) - 4)]
            continue
        first = first or found
        yield [*label, *figures(found, first)]


def figures(found: Measured, first: Measured) -> list[str]:
    """The columns behind the case's name."""
    result = found.result
    return [
        f"{result.tokens_per_sample:,.0f}",
        f"{result.response_tokens_per_sample:,.0f}",
        f"{found.tokens_per_s:,.0f}",
        f"{found.step_s:.2f}",
        f"{found.sample_s:.3f}",
        f"{found.sample_s / first.sample_s:.2f}",
        f"{found.mfu:.0%}",
        f"{(result.peak_memory_bytes or 0) / GB:.2f}",
    ]


def paper() -> Iterator[list[object]]:
    """What Table 3 prints of a 7B model."""
    _, whole = TRAINING_TOKENS["Original"]
    for kind, method in (("original", "Original"), ("pruned", "ASAP")):
        tokens, step = TRAINING_TOKENS[method]
        sample = f"{step / PAPER_STEP:.3f}"
        loss, ratio = f"{tokens:,}", f"{step / whole:.2f}"
        yield [f"{kind}, paper", "unsloth", "single", "", loss, "", step, sample, ratio, "", ""]


def train(config: TrainConfig, data: Data, kind: str, base: Path) -> Measured | str:
    """One run in a process of its own; the code of its problem when it does not end well."""
    with tempfile.TemporaryDirectory() as home:
        run = TrainRun(
            id=uuid4().hex, tenant="local", config=config, base=str(base), model="bench", data=""
        )
        files = RunFiles(BlobStore.in_folder(Path(home, "blobs")), run.prefix)
        for name, file in data.files.items():
            files.write(f"{name}.jsonl", file.read_bytes())
        other = next(name for name in data.files if name != kind)
        places = {name: f"{run.prefix}/{name}.jsonl" for name in data.files}
        run = run.grown(data=places[kind], common_with=(places[other],))
        files.write("spec.json", run.model_dump_json().encode())
        done = subprocess.run(
            [sys.executable, "-m", "asap_trainer.train", "--run", run.prefix],
            env={**os.environ, "ASAP_HOME": home, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            check=False,
        )
        written = files.read("result.json")
        if written is None:
            problem = json.loads(files.read("problem.json") or b"{}")
            return str(problem.get("code", f"ended with {done.returncode}"))
        rows = [json.loads(line) for line in (files.read("metrics.jsonl") or b"").splitlines()][1:]
    seconds = sum(row["step_seconds"] for row in rows)
    return Measured(
        result=TrainResult.model_validate_json(written),
        tokens_per_s=sum(row["tokens"] for row in rows) / seconds,
        step_s=seconds / len(rows),
        mfu=sum(row["mfu"] * row["step_seconds"] for row in rows) / seconds,
    )


if __name__ == "__main__":
    main()
