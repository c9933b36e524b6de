"""What a run would take before it is started: a real optimiser step at full length, and the same
for settings that could do better.

Each setting is measured in a process of its own, so that one which finds no memory, or is killed
for it, is an answer and not the end.
"""

from __future__ import annotations

import gc
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, JsonValue

from asap.errors import AsapError, CapacityError, Misconfigured, TrainingFailed
from asap.sft import SftExample
from asap.train_config import TrainConfig
from asap.types import Frozen
from asap_trainer.backends import Device, build_trainer, find_device, load_model, prepare_imports
from asap_trainer.batches import dataset_of, rows_of, total_steps
from asap_trainer.metering import Work, peak_memory_bytes, wait

__all__ = [
    "Cost",
    "Preflight",
    "StepTimes",
    "Suggestion",
    "cost_of",
    "longest_row",
    "measure",
    "preflight",
]

SUGGESTIONS = 3
KEPT_SHARE = 0.9
"""Of the samples that a shorter max_seq_length keeps."""
CLEARLY = 0.95
"""Share of the asked time below which a setting is worth naming; clocks differ by some per cent."""
MOST_DEVICES = 64
"""Of a config."""
ASKED, ANSWER = "preflight-asked.json", "preflight-answer.json"
_STEPS = 2
"""The first one takes up memory and compiles; the second one is timed."""


class StepTimes(Frozen):
    """What one setting took; lengths in tokens, times in seconds."""

    device: str
    peak_memory_bytes: int
    state_bytes: int
    """Of weights, gradients and the optimiser's moments, which FSDP divides between devices."""
    full: int
    """The longest row of the run."""
    full_s: float
    """Of one such row, forward and backward."""
    typical: int
    typical_s: float
    optimizer_s: float


class Cost(Frozen):
    """What a run would take with one setting."""

    fits: bool
    """Whether a step at full length found enough memory; if not, all else is unknown."""
    peak_memory_bytes: int | None = None
    step_seconds: float | None = None
    """Of a mean step of the whole run."""
    hours: float | None = None
    """Of the whole run, reading and saving left out."""
    usd: float | None = None
    steps: int | None = None
    dropped: int = 0
    """Samples that this setting cannot hold and the asked one can."""


class Suggestion(Cost):
    """Another setting, measured like the asked one."""

    change: dict[str, JsonValue] = Field(min_length=1)
    """Fields of the config."""


class Preflight(Frozen):
    """The answer: the asked setting, and others that fit where it does not or take less time."""

    device: str | None
    asked: Cost
    suggestions: tuple[Suggestion, ...]


def preflight(
    config: TrainConfig, lengths: Sequence[int], base: Path, price: float | None, folder: Path
) -> Preflight:
    """Measure the asked setting and its neighbours.

    Args:
        config: as asked.
        lengths: tokens of each sample that is trained on.
        base: directory of the base model.
        price: of one device and hour.
        folder: for files on the way.

    Raises:
        Misconfigured: the run would refuse to start.
        TrainingFailed: the step failed.
    """
    times = _measured_apart(config, lengths, base, folder)
    asked = cost_of(config, lengths, times, price)
    found: list[tuple[dict[str, JsonValue], Cost]] = []
    for change in _changes(config, lengths, fits=times is not None):
        other = TrainConfig.model_validate({**config.model_dump(), **change})
        kept = [length for length in lengths if length <= other.max_seq_length]
        try:
            cost = cost_of(other, kept, _measured_apart(other, kept, base, folder), price)
        except (Misconfigured, TrainingFailed):  # not for this model or this device
            continue
        found.append((change, cost.model_copy(update={"dropped": len(lengths) - len(kept)})))
    if times is not None and config.nodes == 1 and 0 < config.gpus <= MOST_DEVICES // 2:
        found.append(_on_more_devices(config, lengths, times, price))
    limit = math.inf if asked.hours is None else CLEARLY * asked.hours
    better = [
        Suggestion(change=change, **cost.model_dump())
        for change, cost in found
        if cost.hours is not None and cost.hours < limit
    ]
    best = sorted(better, key=lambda one: one.hours or 0.0)[:SUGGESTIONS]
    return Preflight(device=times.device if times else None, asked=asked, suggestions=tuple(best))


def _on_more_devices(
    config: TrainConfig, lengths: Sequence[int], times: StepTimes, price: float | None
) -> tuple[dict[str, JsonValue], Cost]:
    """Twice the devices, computed: the time that they talk to each other is left out."""
    change = _devices(config, 2)
    other = TrainConfig.model_validate({**config.model_dump(), **change})
    spared = times.state_bytes // config.gpus - times.state_bytes // other.gpus
    shared = times.model_copy(update={"peak_memory_bytes": times.peak_memory_bytes - spared})
    return change, cost_of(other, lengths, shared, price)


def cost_of(
    config: TrainConfig, lengths: Sequence[int], times: StepTimes | None, price: float | None
) -> Cost:
    """What the whole run takes when its steps take so long; None: the step found no memory.

    The time of a row is taken to grow as a n + c n² with its length n; that of a packed row does
    not depend on what is in it. Padding in batches of several samples is left out.
    """
    if times is None:
        return Cost(fits=False)
    rows = rows_of(lengths, config.max_seq_length, packing=config.packing)
    devices = max(1, config.gpus) * config.nodes
    batch = config.batch_size * devices
    steps = total_steps(
        len(rows),
        batch=batch,
        accumulation=config.accumulation,
        epochs=config.epochs,
        max_steps=config.max_steps,
    )
    if config.packing:
        epoch_s = times.full_s * len(rows)
    else:
        linear, square = _curve(times)
        epoch_s = sum(linear * length + square * length**2 for length in lengths)
    per_epoch = math.ceil(math.ceil(len(rows) / batch) / config.accumulation)
    seconds = steps * (epoch_s / devices / per_epoch + times.optimizer_s)
    hours = seconds / 3600
    return Cost(
        fits=True,
        peak_memory_bytes=times.peak_memory_bytes,
        step_seconds=seconds / steps,
        hours=hours,
        usd=None if price is None else price * hours * devices,
        steps=steps,
    )


def _curve(times: StepTimes) -> tuple[float, float]:
    """The a and c of a n + c n² through both measurements; never below a straight line from 0."""
    long, short = times.full_s / times.full, times.typical_s / times.typical
    if times.full == times.typical or short >= long:
        return (times.full_s + times.typical_s) / (times.full + times.typical), 0.0
    square = (long - short) / (times.full - times.typical)
    return short - square * times.typical, square


def longest_row(config: TrainConfig, lengths: Sequence[int]) -> int:
    """Tokens of the longest row that the run has; far below `max_seq_length` for pruned samples."""
    rows = rows_of(lengths, config.max_seq_length, packing=config.packing)
    return max(sum(lengths[index] for index in row) for row in rows)


def _changes(
    config: TrainConfig, lengths: Sequence[int], *, fits: bool
) -> Iterator[dict[str, JsonValue]]:
    """Settings that may need less memory or time."""
    longest = max(lengths)
    kept = sorted(lengths)[math.ceil(KEPT_SHARE * len(lengths)) - 1]
    if kept < 0.9 * longest:
        yield {"max_seq_length": kept}
    if not fits:  # whatever it costs in samples
        for shorter in (longest // 2, longest // 4):
            if min(lengths) <= shorter < kept:
                yield {"max_seq_length": shorter}
        for factor in (2, 4):  # left out where the machine has not so many
            if config.nodes == 1 and 0 < config.gpus <= MOST_DEVICES // factor:
                yield _devices(config, factor)
    if not config.packing and 2 * sum(lengths) < len(lengths) * config.max_seq_length:
        # A step then holds as many samples as before, as nearly as can be.
        held = len(lengths) / len(rows_of(lengths, config.max_seq_length, packing=True))
        passes = max(1, round(config.accumulation * config.batch_size / held))
        yield {"packing": True, "batch_size": 1, "accumulation": passes}
    yield {"gradient_checkpointing": not config.gradient_checkpointing}
    if config.precision == "float32":
        yield {"precision": "bfloat16"}
    if config.batch_size > 1:
        yield {"batch_size": 1, "accumulation": config.accumulation * config.batch_size}


def _devices(config: TrainConfig, factor: int) -> dict[str, JsonValue]:
    passes = max(1, config.accumulation // factor)
    return {"backend": "plain", "gpus": factor * config.gpus, "accumulation": passes}


def _measured_apart(
    config: TrainConfig, lengths: Sequence[int], base: Path, folder: Path
) -> StepTimes | None:
    """What a step takes, from processes of their own, one for each device of a node; None when it
    found no memory.
    """
    typical = max(2, round(sum(lengths) / len(lengths)))
    full = longest_row(config, lengths)
    asked = {"config": config.model_dump(), "full": full, "typical": typical, "base": str(base)}
    (folder / ASKED).write_text(json.dumps(asked))
    (folder / ANSWER).unlink(missing_ok=True)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={config.gpus}"]
    several = [*torchrun, "--"] if config.gpus > 1 else []
    command = [sys.executable, *several, *("-m", "asap_trainer.preflight"), str(folder)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if not (folder / ANSWER).exists():
        if done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL):  # for its memory
            return None
        raise TrainingFailed("the step failed; the log says where", reason="crashed")
    answer = json.loads((folder / ANSWER).read_text())
    if answer.get("code") == CapacityError.code:
        return None
    if "code" in answer:
        raise Misconfigured(answer["detail"], code=answer["code"])
    return StepTimes.model_validate(answer)


def measure(config: TrainConfig, full: int, typical: int, base: Path, folder: Path) -> StepTimes:
    """Take real optimiser steps at full and at typical length, in this process and those that
    torchrun has started with it. Of several nodes one is measured, with all of the weights.

    Raises CapacityError without memory, Misconfigured for what a run would refuse.
    """
    prepare_imports(config, folder)
    import torch

    config = config.model_copy(update={"accumulation": 1, "nodes": 1})
    device = find_device(config)
    model = load_model(config, base, device)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    state_bytes = 4 * sum(weight.nbytes for weight in model.parameters())
    held = full // typical if config.packing else 1
    alone = config.model_copy(update={"packing": False})
    try:
        lengths = [full - (held - 1) * typical, *[typical] * (held - 1)]
        full_s, optimizer_s = _step(config, model, device, lengths, vocabulary)
        peak = peak_memory_bytes(device.torch_device)
        if device.processes > 1:  # FSDP wraps no model twice
            del model
            gc.collect()
            model = load_model(config, base, device)
        typical_s, _ = _step(alone, model, device, [typical], vocabulary)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise CapacityError("a step at full length finds too little memory") from error
        raise
    return StepTimes(
        device=device.name,
        peak_memory_bytes=peak,
        state_bytes=state_bytes,
        full=full,
        full_s=full_s / config.batch_size,
        typical=typical,
        typical_s=typical_s / config.batch_size,
        optimizer_s=optimizer_s,
    )


def _step(
    config: TrainConfig, model: Any, device: Device, lengths: Sequence[int], vocabulary: int
) -> tuple[float, float]:
    """Seconds of a pass and of the optimiser, on rows of samples of these lengths."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: dict[str, float] = {}

        def _note(self, event: str) -> None:
            wait(device.torch_device)
            self.times[event] = time.perf_counter()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self._note("begun")

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            self._note("passed")

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self._note("ended")

    draw = random.Random(config.seed)
    ids = [tuple(draw.randrange(vocabulary) for _ in range(length)) for length in lengths]
    examples = [SftExample(str(number), one, one) for number, one in enumerate(ids)]
    rows = [list(range(len(examples)))] * (config.batch_size * device.processes * _STEPS)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        build_trainer(
            config,
            model,
            device,
            dataset_of(examples, rows),
            steps=_STEPS,
            peak=1e-9,  # the weights are to stay numbers
            folder=Path(folder),
            work=Work(),
            callbacks=[clock],
        ).train()
    times = clock.times
    return times["passed"] - times["begun"], times["ended"] - times["passed"]


def main() -> None:
    """Measure one setting, from a file in the folder to another. What cannot be measured is said
    by whichever process finds it out, and ends all of them.
    """
    folder = Path(sys.argv[1])
    asked = json.loads((folder / ASKED).read_text())
    try:
        config = TrainConfig.model_validate(asked["config"])
        times = measure(config, asked["full"], asked["typical"], Path(asked["base"]), folder)
    except AsapError as error:
        _answer(folder, {"code": error.problem_code, "detail": error.detail})
        sys.exit(1)
    if os.environ.get("RANK", "0") == "0":
        _answer(folder, times.model_dump())


def _answer(folder: Path, answer: dict[str, Any]) -> None:
    part = folder / f"{ANSWER}.{os.getpid()}"
    part.write_text(json.dumps(answer))
    part.replace(folder / ANSWER)


if __name__ == "__main__":
    main()
