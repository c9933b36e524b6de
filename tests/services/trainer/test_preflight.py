"""What a run would take: arithmetic by hand, and settings measured for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from asap.errors import CapacityError, Misconfigured, TrainingFailed
from asap.train_config import TrainConfig
from asap_trainer import preflight as module
from asap_trainer.preflight import StepTimes, cost_of, longest_row, preflight

TIMES = StepTimes(
    device="cpu",
    peak_memory_bytes=1000,
    state_bytes=400,
    full=1000,
    full_s=3.0,
    typical=500,
    typical_s=1.0,
    optimizer_s=0.5,
)
"""A row of n takes n/1000 + 2 (n/1000)² seconds."""


def config(**fields):
    fixed = {"preset": "demo", "max_seq_length": 1000, "max_steps": None, "epochs": 2}
    return TrainConfig.model_validate({**fixed, "accumulation": 2, **fields})


def test_the_time_of_a_run_is_that_of_its_rows():
    cost = cost_of(config(), [1000, 500, 500, 1000], TIMES, 3600.0)
    assert cost.steps == 4
    expected = 2 * (3 + 1 + 1 + 3) + 4 * 0.5
    assert cost.hours * 3600 == pytest.approx(expected)
    assert cost.step_seconds == pytest.approx(expected / 4)
    assert cost.usd == pytest.approx(expected)
    assert cost_of(config(), [1000], TIMES, None).usd is None


def test_a_length_between_the_two_lies_on_the_curve():
    cost = cost_of(config(epochs=1, accumulation=1), [200], TIMES, None)
    assert cost.hours * 3600 == pytest.approx(0.2 + 2 * 0.04 + 0.5)


def test_packed_rows_cost_as_much_as_full_ones():
    cost = cost_of(config(packing=True, epochs=1), [500, 500, 500, 500], TIMES, None)
    assert cost.steps == 1
    assert cost.hours * 3600 == pytest.approx(2 * 3.0 + 0.5)


def test_max_steps_are_a_share_of_the_epochs():
    whole = cost_of(config(epochs=1), [1000] * 8, TIMES, None)
    half = cost_of(config(max_steps=2), [1000] * 8, TIMES, None)
    assert half.hours == pytest.approx(whole.hours / 2)


def test_devices_share_the_rows_and_each_has_its_price():
    one = cost_of(config(gpus=1, backend="plain"), [1000] * 8, TIMES, 1.0)
    four = cost_of(config(gpus=4, backend="plain"), [1000] * 8, TIMES, 1.0)
    assert four.steps == 2
    assert four.hours * 3600 == pytest.approx(2 * (8 * 3.0 / 4 + 0.5))
    assert four.usd == pytest.approx(4 * four.hours)
    assert one.steps == 8


def test_a_step_without_memory_is_an_answer():
    assert cost_of(config(), [1000], None, 1.0).model_dump(exclude_defaults=True) == {"fits": False}


def answers(monkeypatch, measured):
    """In place of the processes that measure."""
    monkeypatch.setattr(module, "_measured_apart", lambda config, *_: measured(config))


def test_only_what_fits_or_takes_less_time_is_named_the_quickest_first(monkeypatch, tmp_path):
    def measured(asked):
        if asked.precision == "bfloat16":
            return TIMES.model_copy(update={"full_s": 1.5, "typical_s": 0.5})
        if asked.gradient_checkpointing:
            return TIMES.model_copy(update={"full_s": 4.0, "typical_s": 1.5})
        return TIMES

    answers(monkeypatch, measured)
    found = preflight(config(), [1000] + [100] * 19, tmp_path, None, tmp_path)
    changes = [one.change for one in found.suggestions]
    assert {"precision": "bfloat16"} in changes
    assert {"max_seq_length": 100} in changes
    assert {"gradient_checkpointing": True} not in changes
    hours = [one.hours for one in found.suggestions]
    assert hours == sorted(hours)
    assert hours[-1] < found.asked.hours
    [shorter] = [one for one in found.suggestions if "max_seq_length" in one.change]
    assert shorter.dropped == 1


def test_what_is_measured_is_the_longest_row_that_the_run_has():
    assert longest_row(config(), [300, 200, 400]) == 400
    assert longest_row(config(packing=True), [300, 200, 400]) == 900
    assert longest_row(config(packing=True), [600, 700]) == 700


def test_where_the_asked_does_not_fit_shorter_samples_are_tried(monkeypatch, tmp_path):
    answers(monkeypatch, lambda asked: TIMES if asked.max_seq_length <= 250 else None)
    found = preflight(config(), [1000] * 5 + [800, 400, 200, 200], tmp_path, None, tmp_path)
    assert not found.asked.fits
    [shorter] = found.suggestions
    assert shorter.change == {"max_seq_length": 250}
    assert shorter.dropped == 7


def test_where_the_asked_does_not_fit_whatever_fits_is_named(monkeypatch, tmp_path):
    def measured(asked):
        return TIMES if asked.gradient_checkpointing else None

    answers(monkeypatch, measured)
    found = preflight(config(), [1000] * 4, tmp_path, None, tmp_path)
    assert not found.asked.fits
    assert [one.change for one in found.suggestions] == [{"gradient_checkpointing": True}]


def test_more_devices_share_the_state(monkeypatch, tmp_path):
    def measured(asked):
        changed = asked.gradient_checkpointing or asked.precision == "bfloat16"
        return None if changed else TIMES

    answers(monkeypatch, measured)
    found = preflight(config(gpus=1), [1000] * 8, tmp_path, 2.0, tmp_path)
    [two] = found.suggestions
    assert two.change == {"backend": "plain", "gpus": 2, "accumulation": 1}
    assert two.peak_memory_bytes == 1000 - 200
    assert two.hours < found.asked.hours


def test_where_the_asked_does_not_fit_more_devices_are_tried(monkeypatch, tmp_path):
    answers(monkeypatch, lambda asked: TIMES if asked.gpus == 4 else None)
    found = preflight(config(gpus=1, accumulation=16), [1000] * 8, tmp_path, None, tmp_path)
    assert not found.asked.fits
    [four] = found.suggestions
    assert four.change == {"backend": "plain", "gpus": 4, "accumulation": 4}


def test_no_more_devices_are_named_than_a_run_can_have(monkeypatch, tmp_path):
    for measured in (TIMES, None):
        answers(monkeypatch, lambda asked, measured=measured: measured)
        found = preflight(config(gpus=64, backend="plain"), [1000] * 8, tmp_path, None, tmp_path)
        assert not [one for one in found.suggestions if "gpus" in one.change]


@pytest.mark.parametrize("error", [Misconfigured("no bfloat16"), TrainingFailed("crashed")])
def test_a_neighbour_that_cannot_run_is_left_out(monkeypatch, tmp_path, error):
    def measured(asked):
        if asked.precision == "bfloat16":
            raise error
        return TIMES

    answers(monkeypatch, measured)
    found = preflight(config(), [1000] * 4, tmp_path, None, tmp_path)
    assert not [one for one in found.suggestions if "precision" in one.change]


@pytest.mark.slow
def test_a_step_that_is_killed_for_its_memory_does_not_fit(tiny_model_dir, tmp_path, monkeypatch):
    """Really measured, by a process that the kernel ends."""
    plain = config(backend="plain", max_seq_length=128)
    found = module._measured_apart(plain, [128, 64], tiny_model_dir, tmp_path)
    assert found.full == 128
    assert found.typical == 96
    assert module._measured_apart(plain, [90, 64], tiny_model_dir, tmp_path).full == 90
    assert 0 < found.full_s < 60
    assert found.state_bytes > 4 * 4 * 100_000
    killer = tmp_path / "killer"
    killer.write_text("#!/bin/sh\nkill -KILL $$\n")
    killer.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(killer))
    assert module._measured_apart(plain, [128], tiny_model_dir, tmp_path) is None


@pytest.mark.slow
def test_several_devices_are_measured_together(tiny_model_dir, tmp_path):
    """Two processes with FSDP2, as torchrun starts them for two devices."""
    asked = {
        "config": config(backend="plain", max_seq_length=128).model_dump(),
        "full": 96,
        "typical": 64,
        "base": str(tiny_model_dir),
    }
    (tmp_path / module.ASKED).write_text(json.dumps(asked))
    script = "import fsdp_on_cpu\n"
    script += "from asap_trainer.preflight import main\nmain()\n"
    (tmp_path / "measures.py").write_text(script)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--"]
    subprocess.run(
        [sys.executable, *launch, str(tmp_path / "measures.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
    )
    found = StepTimes.model_validate_json((tmp_path / module.ANSWER).read_text())
    assert found.device == "2 x cpu"
    assert (found.full, found.typical) == (96, 64)
    assert found.full_s > 0
    assert found.state_bytes > 4 * 4 * 100_000


def test_each_device_of_a_node_has_a_process(tiny_model_dir, tmp_path, monkeypatch):
    recorder = tmp_path / "recorder"
    answer = tmp_path / module.ANSWER
    text = json.dumps({"code": CapacityError.code, "detail": ""})
    recorder.write_text(
        f"#!/bin/sh\necho \"$@\" >> {tmp_path}/commands\necho '{text}' > {answer}\n"
    )
    recorder.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(recorder))
    for gpus in (1, 4):
        asked = config(backend="plain", gpus=gpus)
        assert module._measured_apart(asked, [100], tiny_model_dir, tmp_path) is None
    one, four = (tmp_path / "commands").read_text().splitlines()
    assert one.startswith("-m asap_trainer.preflight")
    assert "torch.distributed.run" in four
    assert "--nproc-per-node=4" in four


@pytest.mark.slow
def test_what_a_run_would_refuse_the_preflight_refuses(tiny_model_dir, tmp_path):
    asked = config(backend="plain", max_seq_length=4096)
    with pytest.raises(Misconfigured, match="max_seq_length"):
        preflight(asked, [100], tiny_model_dir, None, tmp_path)
