"""The run itself: resume, train, watch, write checkpoints, stop when told, measure held-out loss.

Imported after the backend's libraries. Knows no blob store: figures go to the reporter, checkpoints
to their keeper, and files to a folder.
"""

from __future__ import annotations

import math
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from asap.errors import CapacityError, Misconfigured, TrainingFailed
from asap.sft import IGNORED, SftExample
from asap.train_config import TrainConfig
from asap_trainer.backends import Device, build_trainer
from asap_trainer.batches import collate, collate_packed, dataset_of, rows_of, total_steps
from asap_trainer.checkpoints import Checkpoint
from asap_trainer.metering import StepCost, Work, peak_memory_bytes, peak_rate
from asap_trainer.packing import packed_row
from asap_trainer.progress import Reporter

__all__ = ["Figures", "Loop"]

_LEAK = 0.01
"""Share by which the loss of a packed sample may differ from that of the same one alone: bfloat16
rounds its mean by less."""


@dataclass
class Figures:
    """What a run has come to; the part that a later process cannot measure is in checkpoints."""

    held_out_before: float | None = None
    held_out_after: float | None = None
    seconds: float = 0.0
    """Of all processes."""
    step_seconds: float = 0.0
    tokens: int = 0
    """Trained on in all steps."""


@dataclass
class Loop:
    """One process's part in a run.

    Args:
        config: the recipe.
        device: of `find_device`.
        train, held_out: the samples.
        peak: learning rate.
        reporter: is told the figures.
        store: takes over a checkpoint: its step, folder and figures. None in all processes but the
            first.
        stop: once set, a checkpoint is written after the step and training ends.
        folder: for checkpoints.
    """

    config: TrainConfig
    device: Device
    train: Sequence[SftExample]
    held_out: Sequence[SftExample]
    peak: float
    reporter: Reporter
    store: Callable[[int, Path, dict[str, Any]], None]
    stop: threading.Event
    folder: Path
    figures: Figures = field(default_factory=Figures)
    work: Work = field(default_factory=Work)
    stopped: bool = False
    resumed_folder: Path | None = None
    """On this machine, until it has been read."""

    def run(self, model: Any, lengths: Sequence[int], resumed: Checkpoint | None) -> Any:
        """Train to the end, or until told to stop. Returns the trainer, which has the weights.

        Raises TrainingFailed when the loss is no number any more, CapacityError without memory,
        Misconfigured when the model cannot keep packed samples apart.
        """
        config = self.config
        rows = rows_of(lengths, config.max_seq_length, packing=config.packing)
        steps = total_steps(
            len(rows),
            batch=config.batch_size * self.device.processes,
            accumulation=config.accumulation,
            epochs=config.epochs,
            max_steps=config.max_steps,
        )
        watch = _Watch(self, StepCost.of(model), steps)
        self.trainer = build_trainer(
            config,
            model,
            self.device,
            dataset_of(self.train, rows),
            steps=steps,
            peak=self.peak,
            folder=self.folder,
            work=self.work,
            callbacks=[watch],
        )
        self.reporter.update(phase="training", total_steps=steps)
        if resumed is not None:
            self._take_up(resumed)
        try:
            # At the last step the library would make one more.
            if resumed is None or resumed.step < steps:
                folder = None if resumed is None else str(resumed.folder)
                self.trainer.train(resume_from_checkpoint=folder)
            else:
                self.trainer._load_from_checkpoint(str(resumed.folder))
                self.trainer.state.global_step = resumed.step
            if not self.stopped:
                self.figures.held_out_after = self.held_out_loss()
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                "the device has too little memory for a step; a preflight says which settings fit"
            ) from error
        watch.close()
        return self.trainer

    def _take_up(self, resumed: Checkpoint) -> None:
        kept, self.resumed_folder = resumed.figures, resumed.folder
        self.figures.held_out_before = kept["held_out_before"]
        self.figures.seconds, self.figures.tokens = kept["seconds"], kept["tokens"]
        self.reporter.restore(kept["rows"])
        self.reporter.update(step=resumed.step, resumed_from=resumed.step)

    def held_out_loss(self) -> float | None:
        """Mean nats per token with loss on the held-out samples; None when there are none."""
        if not self.held_out:
            return None
        trainer, processes = self.trainer, self.device.processes
        turns = range(trainer.args.process_index, len(self.held_out) + processes - 1, processes)
        nats, count = 0.0, 0
        for turn in list(turns)[: -(-len(self.held_out) // processes)]:
            # All processes run equally often, or the sharded weights could not be gathered.
            example = self.held_out[min(turn, len(self.held_out) - 1)]
            tokens = sum(label >= 0 for label in example.labels[1:])
            loss = self._loss(collate([_row(example)]))
            if turn < len(self.held_out):
                nats, count = nats + loss * tokens, count + tokens
        sums = self.summed([nats, float(count)])
        return sums[0] / sums[1]

    def check_packing(self) -> None:
        """Raise Misconfigured when a sample's loss depends on its neighbours in the row.

        A copy of a sample behind itself is easy to predict for whoever can look at the first.
        """
        example = min(self.train, key=lambda one: len(one.input_ids))
        apart = self._loss(collate([_row(example)]))
        unseen = replace(example, labels=(IGNORED,) * len(example.labels))
        together = self._loss(collate_packed([packed_row([unseen, example])._asdict()]))
        if abs(together - apart) > _LEAK * apart:
            raise Misconfigured(
                f"backend {self.config.backend!r} lets packed samples of this model see each other "
                "on this device; set packing to false, or take the other backend"
            )

    def _loss(self, batch: dict[str, Any]) -> float:
        model = self.trainer.model_wrapped
        model.eval()
        loss, _, _ = self.trainer.prediction_step(model, batch, prediction_loss_only=True)
        model.train()
        return float(loss)

    def summed(self, values: Sequence[float]) -> list[float]:
        """The sums over all processes."""
        if self.device.processes == 1:
            return list(values)
        held = torch.tensor(values, dtype=torch.float64, device=self.device.torch_device)
        torch.distributed.all_reduce(held)
        return held.tolist()


def _row(example: SftExample) -> dict[str, Sequence[int]]:
    return {"input_ids": example.input_ids, "labels": example.labels}


class _Watch(TrainerCallback):
    """Reads the clock, says when to log and to save, and passes on what comes of it."""

    def __init__(self, loop: Loop, cost: StepCost, steps: int) -> None:
        self._loop, self._cost, self._steps = loop, cost, steps
        self._rate = peak_rate(loop.device.torch_device, loop.device.products)
        self._begun = self._saved = time.monotonic()
        self._busy_s = self._since_log_s = 0.0
        self._done = self._since_log = 0
        self._last_saved = -1
        self._step_begun = 0.0

    def close(self) -> None:
        """Figures of this process that are known at its end."""
        figures = self._loop.figures
        figures.seconds += time.monotonic() - self._begun
        figures.step_seconds = self._busy_s / self._done if self._done else 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        loop = self._loop
        if loop.config.packing:
            loop.check_packing()
        if state.global_step == 0:
            loop.figures.held_out_before = loop.held_out_loss()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._step_begun = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        spent = time.monotonic() - self._step_begun
        self._busy_s += spent
        self._since_log_s += spent
        self._done, self._since_log = self._done + 1, self._since_log + 1
        loop, config, step = self._loop, self._loop.config, state.global_step
        loop.reporter.update(step=step, epoch=state.epoch or 0.0, total_steps=self._steps)
        overdue = time.monotonic() - self._saved > config.save_minutes * 60
        told, overdue = (bool(flag) for flag in loop.summed([loop.stop.is_set(), overdue]))
        if loop.resumed_folder is not None:  # every process has read it by now
            shutil.rmtree(loop.resumed_folder, ignore_errors=True)
            loop.resumed_folder = None
        if told and step < self._steps:
            loop.stopped = control.should_training_stop = True
        if told or overdue or (config.save_every and step % config.save_every == 0):
            control.should_save = True
        if control.should_save or step == self._steps:
            control.should_log = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._loop.config.save_every is None and self._last_saved != state.global_step:
            control.should_save = True
            control.should_log = self._since_log > 0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" not in logs or not self._since_log:  # the library's summary at the end
            return
        loop = self._loop
        loss, norm = float(logs["loss"]), float(logs["grad_norm"])
        counts = loop.work.take()
        work = dict(zip(counts, map(int, loop.summed(list(counts.values()))), strict=True))
        rate = self._rate * loop.device.processes
        busy = self._since_log_s
        row = {
            "step": state.global_step,
            "epoch": state.epoch,
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": float(logs["learning_rate"]),
            "tokens": work["tokens"],
            "loss_tokens": work["loss_tokens"],
            "tokens_per_s": work["tokens"] / busy,
            "step_seconds": busy / self._since_log,
            "mfu": self._cost.operations(**work) / busy / rate,
            "peak_memory_bytes": peak_memory_bytes(loop.device.torch_device),
        }
        loop.figures.tokens += work["tokens"]
        self._since_log, self._since_log_s = 0, 0.0
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingFailed(
                f"the loss is no number any more at step {state.global_step}; lower learning_rate, "
                "or set precision to float32",
                reason="diverged",
            )
        loop.reporter.add_row(row)
        shown = {name: row[name] for name in row if name not in ("tokens", "loss_tokens")}
        loop.reporter.update(**shown, eta_s=(self._steps - state.global_step) * row["step_seconds"])

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._saved, self._last_saved = time.monotonic(), state.global_step
        loop = self._loop
        loop.summed([0.0])  # every process has written its part
        if not state.is_world_process_zero:
            return
        figures = {
            "held_out_before": loop.figures.held_out_before,
            "seconds": loop.figures.seconds + time.monotonic() - self._begun,
            "tokens": loop.figures.tokens,
            "rows": list(loop.reporter.rows),
        }
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        loop.store(state.global_step, folder, figures)
