"""Figures reach the store, the latest ones last, and training never hears of its troubles."""

from __future__ import annotations

import json
import threading

import pytest

from asap.errors import UpstreamUnavailable
from asap.runs import TrainProgress
from asap_runtime.blobs import BlobStore
from asap_runtime.run_files import RunFiles
from asap_trainer.progress import Reporter
from waiting import PATIENCE_S


@pytest.fixture
def files(tmp_path):
    return RunFiles(BlobStore.in_folder(tmp_path), "acme/runs/1")


def test_the_last_figures_are_written_at_the_end(files):
    with Reporter(files, period_s=1000) as reporter:
        reporter.update(phase="training", step=1, total_steps=9)
        reporter.add_row({"step": 1, "loss": 2.5})
        reporter.update(step=2)
        reporter.add_row({"step": 2, "loss": 2.0})
    progress = TrainProgress.model_validate_json(files.read("progress.json"))
    assert (progress.phase, progress.step, progress.total_steps) == ("training", 2, 9)
    assert progress.written_at > 1.7e9
    rows = [json.loads(line) for line in files.read("metrics.jsonl").splitlines()]
    assert [row["loss"] for row in rows] == [2.5, 2.0]


def test_figures_are_written_while_the_run_goes_on(files, monkeypatch):
    written = threading.Event()
    write = files.write

    def heard(name, data):
        write(name, data)
        if name == "progress.json" and b'"step":7' in data:
            written.set()

    monkeypatch.setattr(files, "write", heard)
    with Reporter(files, period_s=0.01) as reporter:
        reporter.update(step=7)
        assert written.wait(PATIENCE_S)


def test_a_resumed_run_makes_later_lines_again(files):
    with Reporter(files) as reporter:
        reporter.add_row({"step": 9})
        reporter.restore([{"step": 1}, {"step": 2}])
        reporter.add_row({"step": 3})
    assert [row["step"] for row in reporter.rows] == [1, 2, 3]
    assert len(files.read("metrics.jsonl").splitlines()) == 3


def test_a_store_in_trouble_is_no_trouble_for_the_run(files, monkeypatch):
    write, failures = files.write, [1, 2, 3]

    def fails_at_first(name, data):
        if failures:
            failures.pop()
            raise UpstreamUnavailable("down", code="blob-unavailable")
        write(name, data)

    monkeypatch.setattr(files, "write", fails_at_first)
    with Reporter(files, period_s=0.01) as reporter:
        reporter.update(step=3)
        while failures:
            pass
    assert TrainProgress.model_validate_json(files.read("progress.json")).step == 3


def test_other_processes_write_nothing():
    with Reporter(None, period_s=0.001) as reporter:
        reporter.update(step=3)
    assert reporter.progress.step == 3


def test_an_unknown_figure_is_an_error():
    with pytest.raises(ValueError, match="unknown"):
        Reporter(None).update(unknown=3)
