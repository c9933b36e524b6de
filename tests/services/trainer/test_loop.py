"""The loop on its own; what it does in a run is in test_train and tests/contract."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from asap.errors import TrainingFailed
from asap.sft import IGNORED, SftExample
from asap.train_config import TrainConfig
from asap_trainer.backends import find_device
from asap_trainer.loop import Loop, _Watch
from asap_trainer.metering import StepCost
from asap_trainer.progress import Reporter

CONFIG = TrainConfig(preset="demo", backend="plain", max_seq_length=64, save_every=None)
COST = StepCost(token_weights=10, attention=1, head_weights=5)


@pytest.fixture
def loop(tmp_path):
    example = SftExample("a", (3, 4, 5), (IGNORED, 4, 5))
    return Loop(
        config=CONFIG,
        device=find_device(CONFIG),
        train=[example],
        held_out=[],
        peak=1e-3,
        reporter=Reporter(None),
        store=lambda *_: None,
        stop=threading.Event(),
        folder=tmp_path,
    )


def controls():
    return SimpleNamespace(should_save=False, should_log=False, should_training_stop=False)


def state(step, epoch=0.5):
    return SimpleNamespace(global_step=step, epoch=epoch, is_world_process_zero=True)


def step(watch, number):
    control = controls()
    watch.on_step_begin(None, state(number), control)
    watch.on_step_end(None, state(number), control)
    return control


def test_without_held_out_samples_there_is_no_held_out_loss(loop):
    assert loop.held_out_loss() is None


def test_a_stop_ends_training_behind_the_step_with_a_checkpoint(loop):
    watch = _Watch(loop, COST, 10)
    assert vars(step(watch, 1)) == vars(controls())
    loop.stop.set()
    control = step(watch, 2)
    assert control.should_save
    assert control.should_log
    assert control.should_training_stop
    assert loop.stopped


def test_what_was_resumed_from_goes_behind_the_first_step(loop, tmp_path):
    """It is as large as a checkpoint, and two of those are on their way at times."""
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    loop.resumed_folder = resumed
    watch = _Watch(loop, COST, 10)
    watch.on_step_begin(None, state(4), controls())
    assert resumed.exists()  # the random numbers are read after the training has begun
    watch.on_step_end(None, state(4), controls())
    assert not resumed.exists()


def test_a_stop_behind_the_last_step_does_not_undo_the_run(loop):
    watch = _Watch(loop, COST, 10)
    loop.stop.set()
    assert not step(watch, 10).should_training_stop
    assert not loop.stopped


def test_a_checkpoint_is_due_after_so_many_minutes(loop):
    loop.config = CONFIG.model_copy(update={"save_minutes": 1e-9})
    assert step(_Watch(loop, COST, 10), 1).should_save


def test_a_checkpoint_is_due_at_the_end_of_an_epoch_or_every_so_many_steps(loop):
    watch = _Watch(loop, COST, 10)
    step(watch, 1)
    control = controls()
    watch.on_epoch_end(None, state(1), control)
    assert control.should_save
    loop.config = CONFIG.model_copy(update={"save_every": 3})
    watch = _Watch(loop, COST, 10)
    assert [step(watch, number).should_save for number in range(1, 7)] == [
        number % 3 == 0 for number in range(1, 7)
    ]
    control = controls()
    watch.on_epoch_end(None, state(6), control)
    assert not control.should_save


@pytest.mark.parametrize("figure", ["loss", "grad_norm"])
def test_a_loss_that_is_no_number_fails_the_run(loop, figure):
    watch = _Watch(loop, COST, 10)
    step(watch, 1)
    logs = {"loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-3, figure: float("nan")}
    with pytest.raises(TrainingFailed, match="no number") as caught:
        watch.on_log(None, state(1), controls(), logs=logs)
    assert caught.value.context["reason"] == "diverged"


def test_the_last_line_of_figures_tells_how_long_it_still_takes(loop):
    watch = _Watch(loop, COST, 10)
    step(watch, 1)
    watch.on_log(
        None, state(1), controls(), logs={"loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-3}
    )
    [row] = loop.reporter.rows
    progress = loop.reporter.progress
    assert progress.eta_s == pytest.approx(9 * row["step_seconds"])
    assert (progress.loss, progress.step) == (2.0, 1)
    watch.on_log(None, state(10), controls(), logs={"train_loss": 1.0})  # the library's summary
    assert len(loop.reporter.rows) == 1
