"""`asap eval run` and `asap eval grade` with scripted models and the real sandbox."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from asap.eval_items import EvalItem
from asap_evaluator.sessions import ended, leader
from fake_vllm import FakeVllm, Say, Status
from vllm_program import program, starts
from waiting import PATIENCE_S

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ANSWER = "so it is\n</think>\n```python\ndef f():\n    return 7\n```"


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("ASAP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ASAP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ASAP_EVALUATOR__REFERENCE_CPU_S", "10")  # however slow this machine is now
    monkeypatch.chdir(tmp_path)


def task(number, value=7, padding=0):
    return {
        "task_id": f"T/{number}",
        "prompt": f"def f():\n    'MARKER {number}'\n",
        "entry_point": "f",
        "canonical_solution": f"    return {value}\n",
        "test": f"def check(candidate):\n    assert candidate() == {value}  # {'x' * padding}\n",
    }


@pytest.fixture
def data(tmp_path):
    """Four tasks, of which ANSWER solves all but T/2; the tests of one are too long for a line."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [task(0), task(1), task(2, value=8), task(3, padding=300_000)]
    (folder / "mine.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


@pytest.fixture
def model(tiny_model_dir, tmp_path):
    return shutil.copytree(tiny_model_dir, tmp_path / "tiny")


def options(data, *more):
    return ["--benchmark", "mine", "--data", data, "--set", "template=deepseek-r1", *more]


def lines(folder):
    """Whole ones: the run may be writing the last."""
    text = (folder / "items.jsonl").read_text().rpartition("\n")[0]
    return [EvalItem.model_validate_json(line) for line in text.splitlines()]


def rows_of(folder):
    report = json.loads((folder / "report.json").read_text())
    return {(row["budget"], row["extraction"]): row for row in report["rows"]}


def prompts(server):
    return [json.dumps(body["prompt"]) for body in server.asked("/v1/completions")
            if body["max_tokens"] > 1]  # fmt: skip


def test_a_directory_is_served_asked_graded_and_reported(asap, data, model, tmp_path, monkeypatch):
    executable = tmp_path / "vllm"
    python, script = program()
    executable.write_text(f'#!/bin/sh\nexec {python} {script} "$@"\n')
    executable.chmod(0o755)
    (model / "behaviour.json").write_text(json.dumps({"tokens": [ANSWER]}))
    monkeypatch.setenv("ASAP_EVALUATOR__VLLM__PROGRAM", str(executable))
    out = tmp_path / "out"
    ran = asap("eval", "run", model, *options(data, "--budget", "64,128"), "-o", out)
    assert ran.code == 0, ran.err
    figures = rows_of(out)
    assert list(figures) == [(64, "strict"), (128, "strict"), (64, "lenient"), (128, "lenient")]
    assert {(row["model"], row["tasks"], row["passed"]) for row in figures.values()} == {
        ("tiny", 4, 3)
    }
    assert "75.00" in ran.out
    made_with = json.loads((out / "report.json").read_text())["provenance"]["tiny"]
    assert made_with["sandbox"]["level"] in ("namespaces", "landlock")
    assert made_with["data"]["mine"]["tasks"] == 4
    assert "| tiny | 64 | strict | 4 | 3 | 75.00 |" in (out / "report.md").read_text()
    page = (out / "report.html").read_text()
    assert "75.00" in page
    assert "<script" not in page
    [log] = (tmp_path / "home").rglob("starts.jsonl")
    [start] = starts(log.parent)
    assert all(ended(leader(pid)) for pid in start["pids"]), "the server has outlived the run"


def test_the_same_command_asks_only_what_is_missing(asap, data, model, tmp_path):
    out = tmp_path / "out"
    with FakeVllm(script=[Say(ANSWER)], context=50_000) as server:
        command = [
            "eval", "run", model, *options(data), "--base-url", f"{server.url}/v1",
            "--served-model", server.model, "-o", out,
        ]  # fmt: skip
        assert asap(*command).code == 0
        assert len(prompts(server)) == 4
        whole = (out / "items.jsonl").read_bytes()

        ran = asap(*command)
        assert ran.code == 0
        assert "75.00" in ran.out
        assert len(prompts(server)) == 4, "all was done before"
        assert (out / "items.jsonl").read_bytes() == whole

        # What a power cut leaves: nothing of the last task, and half a line.
        kept = [line for line in whole.splitlines(True) if b'"T/3"' not in line]
        (out / "items.jsonl").write_bytes(b"".join(kept) + b'{"kind": "evalu')
        server.requests.clear()
        assert asap(*command).code == 0
        assert len(prompts(server)) == 1
        assert {item.problems[0].task_id for item in lines(out)} == {f"T/{n}" for n in range(4)}
        assert rows_of(out)[10240, "strict"]["passed"] == 3

        for change in (["--limit", "2"], ["--set", "seed=1"]):
            ran = asap(*command, *change)
            assert ran.code == 65
            assert "holds another evaluation" in ran.err
        (model / "config.json").write_text((model / "config.json").read_text() + "\n")
        assert "holds another evaluation" in asap(*command).err, "the model has changed"


def test_a_killed_run_goes_on_and_asks_nothing_twice_that_was_answered(asap, data, model, tmp_path):
    out = tmp_path / "out"
    with FakeVllm(
        script=[Say(ANSWER), Say(ANSWER), Say(ANSWER, delay_s=600)], context=50_000
    ) as server:
        command = [
            "eval", "run", str(model), *map(str, options(data)), "--base-url", f"{server.url}/v1",
            "--served-model", server.model, "-o", str(out),
        ]  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-m", "asap_cli.main", *command], stderr=subprocess.PIPE, text=True
        )

        def graded():
            if not (out / "items.jsonl").exists():
                return set()
            return {item.problems[0].task_id for item in lines(out) if item.grades}

        until = time.monotonic() + 2 * PATIENCE_S
        while not graded():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < until
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        answered = {item.problems[0].task_id for item in lines(out) if item.samples}
        assert 0 < len(answered) < 4
        server.script = [Say(ANSWER)]
        server.requests.clear()
        ran = asap(*command)
    assert ran.code == 0, ran.err
    assert len(prompts(server)) == 4 - len(answered)
    assert rows_of(out)[10240, "strict"]["tasks"] == 4


def test_ctrl_c_reports_what_is_done(data, model, tmp_path):
    out = tmp_path / "out"
    with FakeVllm(
        script=[Say(ANSWER), Say(ANSWER), Say(ANSWER, delay_s=600)], context=50_000
    ) as server:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "asap_cli.main", "eval", "run", str(model)),
                *map(str, options(data)),
                *("--base-url", server.url, "--served-model", server.model, "-o", str(out)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        until = time.monotonic() + 2 * PATIENCE_S
        while not (out / "items.jsonl").exists() or '"grade":' not in (
            (out / "items.jsonl").read_text()
        ):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < until
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert "goes on from here" in errors
    assert "scored" in said
    assert json.loads((out / "report.json").read_text())["incomplete"]


def test_a_task_that_does_not_fit_the_window_fails_alone(asap, data, model, tmp_path):
    with FakeVllm(script=[Say(ANSWER)], context=15_000) as server:
        rows = [task(0), {**task(1), "prompt": "def f():\n    pass\n" * 2000}]
        (data / "mine.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        command = ["eval", "run", model, *options(data), "--base-url", server.url,
                   "--served-model", server.model, "-o", tmp_path / "out"]  # fmt: skip
        ran = asap(*command)
    assert ran.code == 65
    assert "1 × text-too-long" in ran.err
    assert rows_of(tmp_path / "out")[10240, "strict"]["passed"] == 1


@pytest.mark.parametrize(
    ("setting", "value", "code", "words"),
    [
        ("ASAP_EVALUATOR__VLLM__PROGRAM", "/nowhere/vllm", 78, "cannot be started"),
        ("ASAP_EVALUATOR__REFERENCE_CPU_S", "0.000001", 75, "reference speed"),
    ],
)
def test_what_ends_every_task_ends_the_run_at_once(
    asap, data, model, tmp_path, monkeypatch, setting, value, code, words
):
    monkeypatch.setenv(setting, value)
    ran = asap("eval", "run", model, *options(data), "-o", tmp_path / "out")
    assert ran.code == code
    assert words in ran.err
    assert not list(tmp_path.rglob("starts.jsonl"))


def test_a_server_that_refuses_ends_the_run_with_its_words(asap, data, model, tmp_path):
    with FakeVllm(script=[Say("x"), Status(400)]) as server:
        ran = asap("eval", "run", model, *options(data), "--base-url", server.url,
                   "--served-model", "another", "-o", tmp_path / "out")  # fmt: skip
    assert ran.code == 78
    assert "serves no model of this name" in ran.err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--benchmark", "none"], "no file of benchmark 'none'"),
        (["--budget", "4x"], "--budget"),
        (["--samples", "2"], "temperature 0"),
        (["--extraction", "loose"], "extractions"),
        (["--served-model", "x"], "needs --base-url"),
    ],
)
def test_wrong_options_are_named(asap, data, model, tmp_path, given, words):
    ran = asap("eval", "run", model, "--data", data, *given, "-o", tmp_path / "out")
    assert ran.code == 65
    assert words in ran.err


@pytest.fixture
def samples(tmp_path):
    def write(*rows):
        path = tmp_path / "samples.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return path

    return write


def test_completions_that_are_there_are_graded_without_a_model(asap, data, samples, tmp_path):
    path = samples(
        {"task_id": "T/0", "completion": ANSWER, "completion_tokens": 40},
        {"task_id": "T/0", "completion": "no code</think>", "completion_tokens": 20},
        {"task_id": "T/2", "completion": ANSWER},
        {"task_id": "T/99", "completion": ANSWER},
    )
    out = tmp_path / "out"
    command = ["eval", "grade", path, "--benchmark", "mine", "--data", data, "-o", out]
    ran = asap(*command, "--extraction", "strict")
    assert ran.code == 0, ran.err
    assert "left out: 1 tasks" in ran.err
    assert "'T/99'" in ran.err
    grades = {
        (item.problems[0].task_id, grade.number): grade.grade.verdict
        for item in lines(out)
        for grade in item.grades
    }
    assert grades == {("T/0", 0): "passed", ("T/0", 1): "no-code", ("T/2", 0): "wrong"}
    row = rows_of(out)[10240, "strict"]
    assert (row["model"], row["tasks"], row["accuracy"]) == ("samples", 2, 25.0)
    assert row["tokens"] == 20.0
    assert asap(*command, "--extraction", "lenient").code == 65, "another evaluation"


def test_bad_files_of_completions_are_named_by_their_line(asap, data, samples, tmp_path):
    command = ["--benchmark", "mine", "--data", data, "-o", tmp_path / "out"]
    ran = asap("eval", "grade", samples({"task_id": "T/0", "text": "x"}), *command)
    assert (ran.code, "line 1: completion" in ran.err) == (65, True)
    ran = asap("eval", "grade", samples({"task_id": "X", "completion": "x"}), *command)
    assert (ran.code, "none of the 1 tasks" in ran.err) == (65, True)
    ran = asap("eval", "grade", Path("none.jsonl"), *command)
    assert ran.code == 66


def test_two_runs_are_compared_by_what_both_were_scored_on(asap, data, samples, tmp_path):
    right = {"task_id": "T/0", "completion": ANSWER, "completion_tokens": 10}
    wrong = {**right, "completion": "</think><b>MARKER-HTML</b>", "completion_tokens": 30}
    for name, first in (("good", right), ("bad", wrong)):
        path = samples(first, {**right, "task_id": "T/1"})
        ran = asap("eval", "grade", path, "--name", name, "--benchmark", "mine", "--data", data,
                   "--extraction", "strict", "-o", tmp_path / name)  # fmt: skip
        assert ran.code == 0, ran.err
    out = tmp_path / "both"
    ran = asap("eval", "compare", tmp_path / "good", tmp_path / "bad", "-o", out)
    assert ran.code == 0, ran.err
    report = json.loads((out / "report.json").read_text())
    assert report["candidate"] == "good"
    [found] = report["comparisons"]
    assert (found["both"], found["only_candidate"], found["only_baseline"]) == (1, 1, 0)
    assert found["mcnemar_p"] == 1.0
    assert found["kept_ratio"] == 0.5
    page = (out / "report.html").read_text()
    assert "&lt;b&gt;MARKER-HTML" in page
    assert "<b>MARKER" not in page
    assert "good against the others" in ran.out

    ran = asap("eval", "compare", tmp_path / "good", tmp_path / "bad", "--candidate",
               tmp_path / "bad")  # fmt: skip
    assert "bad against the others" in ran.out
    for wrong_runs in ([tmp_path / "good"], [tmp_path / "good"] * 2):
        assert asap("eval", "compare", *wrong_runs).code == 65
    assert asap("eval", "compare", tmp_path / "good", tmp_path / "none").code == 66
