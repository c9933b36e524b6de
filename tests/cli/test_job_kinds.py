"""`asap jobs train | evaluate | report` against the real server, with scripted stages."""

from __future__ import annotations

import json
import os

import pytest

from asap.runs import TrainProgress, TrainResult
from asap_runtime.logs import configure_logs
from asap_runtime.settings import TelemetrySettings
from asap_runtime.stage import Done
from evaluation_stages import ScriptedEvaluator, ScriptedGrader, write_benchmarks
from live_server import live_server

RESULT = TrainResult(
    model_sha256="5" * 64, steps=40, samples=6, held_out=0, dropped={}, tokens_per_sample=80.0,
    response_tokens_per_sample=70.0, tokens_per_step=320.0, step_seconds=0.5, seconds=20.0,
    loss_first=2.5, loss_last=1.25, data_sha256="1" * 64, template="deepseek-r1", base="demo",
    device="CPU", versions={},
)  # fmt: skip


class ScriptedTrainer:
    """Ends each run at once."""

    name, concurrency = "trainer", 1

    async def start(self):
        """Nothing to load."""

    async def process(self, run):
        progress = TrainProgress(phase="done", step=40, total_steps=40, loss=1.25)
        return Done(run.grown(progress=progress, result=RESULT))

    async def stop(self):
        """Nothing to let go."""


@pytest.fixture(autouse=True)
def quiet():
    configure_logs(TelemetrySettings(log_level="error"))


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    home = tmp_path_factory.mktemp("live")
    evaluator = ScriptedEvaluator()
    stages = [ScriptedTrainer(), evaluator, ScriptedGrader(evaluator)]
    before = os.environ.get("ASAP_BENCHMARKS")
    os.environ["ASAP_BENCHMARKS"] = str(write_benchmarks(home / "benchmarks"))
    try:
        with live_server(home / "home", stages=stages) as server:
            yield server
    finally:
        os.environ.pop("ASAP_BENCHMARKS")
        if before is not None:
            os.environ["ASAP_BENCHMARKS"] = before


@pytest.fixture
def server(live, monkeypatch):
    monkeypatch.setenv("ASAP_SERVER", live.url)
    return live


@pytest.fixture
def pruned(asap, server, samples):
    ran = asap("jobs", "submit", samples, "--method", "original", "--watch")
    assert ran.code == 0, ran.err
    return ran.out.strip()


def test_a_model_is_trained_on_the_records_of_a_job(asap, server, pruned):
    command = ["jobs", "train", pruned, "--base", "demo", "--model", "mine", "--preset", "demo",
               "--set", "max_steps=40"]  # fmt: skip
    ran = asap(*command, "--dry-run")
    assert ran.code == 0, ran.err
    assert ["samples", "6"] in [line.split() for line in ran.out.splitlines()]
    assert "nothing was submitted" in ran.err

    ran = asap(*command, "--watch")
    assert ran.code == 0, ran.err
    job = ran.out.strip()
    assert "done 40/40, loss 1.2500" in ran.err
    assert "2.5000 → 1.2500" in ran.err
    shown = asap("jobs", "show", job).out
    for words in ("train", "mine", "preset=demo", "max_steps=40", "done 40/40"):
        assert words in shown
    listed = asap("jobs", "list").out.splitlines()[1].split()
    assert listed[:3] == [job, "train", "done"]


def test_wrong_recipes_and_origins_are_refused(asap, server, pruned):
    base = ["--base", "demo", "--model", "mine"]
    for options, words in (
        ([pruned, *base, "--set", "epoch=1"], "epochs"),
        ([pruned, *base, "--preset", "none"], "preset"),
        (["0" * 32, *base], "no job"),
        (["s3://elsewhere/data.jsonl", *base], "expected an address that begins with"),
    ):
        ran = asap("jobs", "train", *options)
        assert ran.code in (65, 66)
        assert words in ran.err


def test_a_model_is_evaluated_and_its_report_printed_in_every_form(asap, server, tmp_path):
    command = ["jobs", "evaluate", "slow", "--benchmark", "humaneval,humaneval-plus", "--budget",
               "64,128"]  # fmt: skip
    ran = asap(*command, "--dry-run")
    assert ran.code == 0, ran.err
    assert ["generations", "10"] in [line.split() for line in ran.out.splitlines()]

    ran = asap(*command, "--watch")
    assert ran.code == 0, ran.err
    job = ran.out.strip()
    assert "generate 5/5, grade 5/5" in ran.err
    figures = [line.split()[:7] for line in ran.err.splitlines()]
    assert ["slow", "humaneval", "64", "strict", "4", "3", "75.00"] in figures
    shown = asap("jobs", "show", job).out
    assert "5, 5 generated, 5 done" in shown

    table = asap("jobs", "report", job)
    assert "humaneval-plus" in table.out
    assert "4 of 164 tasks are scored" in " ".join(table.out.split())
    report = json.loads(asap("jobs", "report", job, "--format", "json").out)
    assert {row["model"] for row in report["rows"]} == {"slow"}
    assert asap("jobs", "report", job, "--format", "markdown").out.startswith("# Evaluation")
    page = tmp_path / "report.html"
    assert asap("jobs", "report", job, "--format", "html", "-o", page).code == 0
    assert "75.00" in page.read_text()
    assert asap("jobs", "report", job, "-o", page).code == 65

    other = asap("jobs", "evaluate", "quick", "--benchmark", "humaneval", "--budget", "64",
                 "--watch").out.strip()  # fmt: skip
    ran = asap("eval", "compare", other, job, "-o", tmp_path / "both")
    assert ran.code == 0, ran.err
    found = json.loads((tmp_path / "both" / "report.json").read_text())
    assert found["candidate"] == "quick"
    assert {(c["baseline"], c["tasks"]) for c in found["comparisons"]} == {("slow", 4)}
    assert (tmp_path / "both" / "report.html").stat().st_size > 1000


def test_other_jobs_have_no_report(asap, server, pruned):
    assert asap("jobs", "report", pruned).code == 65
    assert asap("jobs", "report", "0" * 32).code == 66
    ran = asap("eval", "compare", pruned, "0" * 32)
    assert ran.code == 65
    assert "expected evaluate" in ran.err
