"""`asap train` with real training processes of the tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from training_runs import stands_still, triples
from waiting import PATIENCE_S

pytestmark = pytest.mark.timeout(300)
SECRET = "zebra-crossing-text"


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("ASAP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ASAP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in triples()))
    return path


def recipe(**knobs):
    values = {"backend": "plain", "max_seq_length": 256, "max_steps": 6, "save_every": 2,
              "log_every": 1, **knobs}  # fmt: skip
    return ["--preset", "demo", *(f"--set={name}={value}" for name, value in values.items())]


def test_a_preview_starts_nothing_and_shows_the_text_that_carries_loss(
    asap, data, tiny_model_dir, tmp_path
):
    ran = asap("train", data, "--base", tiny_model_dir, *recipe(), "--preview")
    assert ran.code == 0, ran.err
    assert "loss from here on" in ran.out
    assert "14 samples, 2 held out" in " ".join(ran.out.split())
    assert not (tmp_path / "home" / "training").exists()


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (["--set", "learning_rat=1"], 65, "learning_rate"),
        (["--set", "epochs=-1"], 65, "epochs"),
        ([], 65, "--out is needed"),
    ],
)
def test_wrong_options_are_named_before_anything_starts(asap, data, change, code, words):
    ran = asap("train", data, "--preset", "demo", *change)
    assert ran.code == code
    assert words in ran.err


def test_data_that_is_not_there_and_an_out_that_is_something_else(asap, data, tmp_path):
    ran = asap("train", tmp_path / "none.jsonl", *recipe(), "-o", tmp_path / "model")
    assert ran.code == 66
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("one")
    ran = asap("train", data, *recipe(), "-o", tmp_path / "thesis")
    assert ran.code == 65
    assert "is no model of an earlier run" in ran.err
    assert (tmp_path / "thesis" / "chapter").read_text() == "one"


@pytest.mark.slow
def test_a_run_ends_with_a_model_and_the_same_command_has_nothing_left_to_do(
    asap, data, tiny_model_dir, tmp_path
):
    command = ["train", data, "--base", tiny_model_dir, *recipe(), "-o", tmp_path / "model"]
    ran = asap(*command)
    assert ran.code == 0, ran.err
    assert "loss" in ran.err
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "run.json"} <= names
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    runs = list((tmp_path / "home" / "blobs" / "local" / "runs").iterdir())
    again = asap(*command)
    assert again.code == 0
    assert list((tmp_path / "home" / "blobs" / "local" / "runs").iterdir()) == runs
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_and_the_same_command_goes_on_from_there(
    asap, data, tiny_model_dir, tmp_path, monkeypatch
):
    python = stands_still(tmp_path / "interpreter")
    monkeypatch.setenv("ASAP_TRAINER__PYTHON", str(python))
    options = [*recipe(max_steps=12), "-o", str(tmp_path / "model")]
    command = ["train", str(data), "--base", str(tiny_model_dir), *options]
    process = subprocess.Popen(
        [sys.executable, "-m", "asap_cli.main", *command], stderr=subprocess.PIPE, text=True
    )
    runs = tmp_path / "home" / "blobs" / "local" / "runs"
    while not list(runs.glob("*/checkpoints/*/manifest.json")):
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=4 * PATIENCE_S)[1]
    assert process.returncode == 130
    assert "goes on from there" in said
    assert not (tmp_path / "model").exists()
    (python.parent / "go").touch()
    assert asap(*command).code == 0
    (run,) = runs.iterdir()
    assert json.loads((run / "progress.json").read_text())["resumed_from"] >= 2


@pytest.mark.slow
def test_a_run_that_refuses_its_data_says_why_and_shows_none_of_it(asap, tmp_path, tiny_model_dir):
    path = tmp_path / "data.jsonl"
    rows = [{**row, "answer": f"{SECRET} </think>"} for row in triples()]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    ran = asap("train", path, "--base", tiny_model_dir, *recipe(), "-o", tmp_path / "model")
    assert ran.code == 65
    assert ran.err.splitlines()[-1].startswith("asap: ")
    assert SECRET not in ran.err + ran.out
    assert not (tmp_path / "model").exists()
