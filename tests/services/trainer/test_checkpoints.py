"""Checkpoints reach the store in the background; the newest good one is found again."""

from __future__ import annotations

import threading

import pytest
import tenacity

from asap.errors import UpstreamUnavailable
from asap_runtime.blobs import BlobStore
from asap_runtime.run_files import RunFiles
from asap_trainer.checkpoints import Checkpoints
from waiting import PATIENCE_S


@pytest.fixture
def files(tmp_path):
    return RunFiles(BlobStore.in_folder(tmp_path / "blobs"), "acme/runs/1")


@pytest.fixture
def written(tmp_path):
    def write(step, text="weights"):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_text(f"{text} {step}")
        return folder

    return write


def store(files, written, *steps, mark="m"):
    for step in steps:
        with Checkpoints(files, mark) as checkpoints:
            checkpoints.store(step, written(step), {"rows": [step]})


def test_the_newest_comes_back_with_its_figures(files, written, tmp_path):
    store(files, written, 9, 10)
    found = Checkpoints(files, "m").newest(tmp_path / "back")
    assert (found.step, found.figures["rows"]) == (10, [10])
    assert (found.folder / "model.safetensors").read_text() == "weights 10"
    assert Checkpoints(files, "m").fetched(tmp_path / "back") == found


def test_two_are_kept_and_the_folders_here_go(files, written, tmp_path):
    store(files, written, 10, 20, 30)
    assert files.folders("checkpoints") == ["checkpoints/step-20", "checkpoints/step-30"]
    assert not list(tmp_path.glob("checkpoint-*"))


def test_what_an_earlier_process_left_beyond_or_half_written_goes(files, written):
    store(files, written, 10, 40)
    files.write("checkpoints/step-15/model.safetensors", b"killed")
    store(files, written, 20)
    assert files.folders("checkpoints") == ["checkpoints/step-10", "checkpoints/step-20"]


def test_a_damaged_one_is_skipped(files, written, tmp_path):
    store(files, written, 10, 20)
    files.write("checkpoints/step-20/model.safetensors", b"weights 21")
    assert Checkpoints(files, "m").newest(tmp_path / "back").step == 10
    files.write("checkpoints/step-10/model.safetensors", b"x")
    assert Checkpoints(files, "m").newest(tmp_path / "back") is None
    assert Checkpoints(files, "m").fetched(tmp_path / "back") is None


def test_one_of_another_config_or_data_is_skipped(files, written, tmp_path):
    store(files, written, 10)
    assert Checkpoints(files, "other").newest(tmp_path / "back") is None


def test_training_does_not_wait_and_a_newer_one_overtakes(files, written, monkeypatch, tmp_path):
    upload, busy, go_on = files.upload_folder, threading.Event(), threading.Event()

    def slow(folder, name):
        busy.set()
        assert go_on.wait(PATIENCE_S)
        return upload(folder, name)

    monkeypatch.setattr(files, "upload_folder", slow)
    with Checkpoints(files, "m") as checkpoints:
        checkpoints.store(10, written(10), {})
        assert busy.wait(PATIENCE_S)
        checkpoints.store(20, written(20), {})
        checkpoints.store(30, written(30), {})
        assert not (tmp_path / "checkpoint-20").exists()
        go_on.set()
    assert files.folders("checkpoints") == ["checkpoints/step-10", "checkpoints/step-30"]


def test_a_store_that_comes_back_gets_the_checkpoint(files, written, monkeypatch, tmp_path):
    monkeypatch.setattr(Checkpoints._upload.retry, "wait", tenacity.wait_none())
    upload, failures = files.upload_folder, [1, 2]

    def fails_twice(folder, name):
        if failures:
            failures.pop()
            raise UpstreamUnavailable("down", code="blob-unavailable")
        return upload(folder, name)

    monkeypatch.setattr(files, "upload_folder", fails_twice)
    store(files, written, 10)
    assert files.complete_folders("checkpoints") == ["checkpoints/step-10"]


def test_a_store_that_stays_away_costs_the_checkpoint_alone(files, written, monkeypatch, tmp_path):
    monkeypatch.setattr(Checkpoints._upload.retry, "wait", tenacity.wait_none())
    upload = files.upload_folder

    def fails_for_ten(folder, name):
        if name.endswith("10"):
            raise UpstreamUnavailable("down", code="blob-unavailable")
        return upload(folder, name)

    monkeypatch.setattr(files, "upload_folder", fails_for_ten)
    store(files, written, 10, 20)
    assert files.complete_folders("checkpoints") == ["checkpoints/step-20"]


def test_trouble_of_the_store_is_not_mistaken_for_no_checkpoint(
    files, written, monkeypatch, tmp_path
):
    store(files, written, 10)

    def down(name, folder):
        raise UpstreamUnavailable("down", code="blob-unavailable")

    monkeypatch.setattr(files, "download_folder", down)
    with pytest.raises(UpstreamUnavailable):
        Checkpoints(files, "m").newest(tmp_path / "back")
