from __future__ import annotations

import os
from pathlib import Path

import pytest

from asap.errors import InvalidInput, Misconfigured, TrainingFailed
from asap_evaluator.model_cache import ModelCache, ModelSource
from asap_runtime.blobs import BlobStore
from asap_runtime.demo_model import demo_directory
from asap_runtime.run_files import RunFiles


@pytest.fixture
def blobs(tmp_path):
    return BlobStore.in_folder(tmp_path / "blobs")


@pytest.fixture
def cache(tmp_path, blobs):
    return ModelCache(tmp_path / "models", blobs, allowed=tmp_path / "allowed", kept=2)


@pytest.fixture
def registered(tmp_path, blobs):
    """Puts a model with these weights where a training run leaves it."""

    def register(weights: bytes) -> ModelSource:
        folder = tmp_path / "made"
        folder.mkdir(exist_ok=True)
        for name in ("config.json", "tokenizer.json"):
            (folder / name).write_text("{}")
        (folder / "model.safetensors").write_bytes(weights)
        prefix = f"t/runs/{weights.hex()}"
        sha256 = RunFiles(blobs, prefix).upload_folder(folder, "model")
        return ModelSource("mine@1", f"{prefix}/model", sha256)

    return register


def test_a_registered_model_is_fetched_once(cache, registered, tmp_path, blobs):
    source = registered(b"one")
    folder = cache.locate(source)
    assert (folder / "model.safetensors").read_bytes() == b"one"
    assert folder.name == source.sha256
    blobs.delete_below(source.prefix)
    assert cache.locate(source) == folder, "it is there"
    assert [path.name for path in (tmp_path / "models").iterdir()] == [source.sha256]


def test_a_name_that_means_another_model_now_gives_the_other_one(cache, registered):
    old, new = registered(b"one"), registered(b"two")
    assert (old.name, old.sha256) != (new.name, new.sha256)
    assert (cache.locate(old) / "model.safetensors").read_bytes() == b"one"
    assert (cache.locate(new) / "model.safetensors").read_bytes() == b"two"


def test_models_that_were_used_last_are_kept(cache, registered):
    first, second, third = (registered(weights) for weights in (b"one", b"two", b"three"))
    for age, source in ((200, first), (100, second)):
        folder = cache.locate(source)
        stamp = folder.stat().st_mtime - age
        os.utime(folder, (stamp, stamp))
    cache.locate(first)
    folder = cache.locate(third)
    assert {path.name for path in folder.parent.iterdir()} == {first.sha256, third.sha256}


def test_damaged_files_are_refused_and_not_kept(cache, registered, blobs, tmp_path):
    source = registered(b"one")
    with blobs.create(f"{source.prefix}/model.safetensors") as writer:
        writer.write(b"eno")
    with pytest.raises(TrainingFailed) as caught:
        cache.locate(source)
    assert caught.value.problem_code == "checkpoint-invalid"
    assert list((tmp_path / "models").iterdir()) == []


def test_files_of_another_manifest_are_refused(cache, registered, tmp_path):
    source = registered(b"one")
    with pytest.raises(TrainingFailed):
        cache.locate(ModelSource(source.name, source.prefix, "0" * 64))
    assert list((tmp_path / "models").iterdir()) == []


def test_demo_and_allowed_folders_are_taken_where_they_are(cache, tmp_path):
    assert cache.locate(ModelSource("demo")) == demo_directory()
    mine = tmp_path / "allowed" / "mine"
    mine.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (mine / name).write_text("{}")
    assert cache.locate(ModelSource(str(mine))) == Path(mine)


def test_other_paths_and_what_is_no_model_are_refused(cache, tmp_path):
    with pytest.raises(InvalidInput):
        cache.locate(ModelSource("/etc"))
    (tmp_path / "allowed" / "empty").mkdir(parents=True)
    with pytest.raises(Misconfigured):
        cache.locate(ModelSource(str(tmp_path / "allowed" / "empty")))
