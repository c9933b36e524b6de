"""A run's folders: whole or not, good or not, on disk and in a bucket."""

from __future__ import annotations

import hashlib
import json

import pytest
from moto.moto_server.threaded_moto_server import ThreadedMotoServer

from asap.errors import TrainingFailed
from asap_runtime.blobs import BlobStore, open_blobs
from asap_runtime.run_files import MANIFEST, RunFiles
from asap_runtime.settings import RuntimeSettings
from waiting import free_port

PREFIX = "acme/runs/" + "0" * 32


@pytest.fixture(scope="module")
def s3_server():
    port = free_port()
    server = ThreadedMotoServer("127.0.0.1", port)
    server.start()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture
def on_disk(tmp_path):
    return BlobStore.in_folder(tmp_path / "blobs")


@pytest.fixture
def in_a_bucket(s3_server, tmp_path):
    import fsspec

    keys = {"access_key": "key", "secret_key": "secret", "region": "eu-central-1"}
    files = fsspec.filesystem(
        "s3",
        key="key",
        secret="secret",
        client_kwargs={"endpoint_url": s3_server, "region_name": "eu-central-1"},
        use_listings_cache=False,
        skip_instance_cache=True,
    )
    name = f"runs-{tmp_path.name.replace('_', '-')[-40:]}".lower()
    files.mkdir(name)
    blobs = {"url": f"s3://{name}/deep", "endpoint_url": s3_server, **keys}
    yield open_blobs(RuntimeSettings(home=tmp_path, blobs=blobs))
    files.rm(name, recursive=True)


@pytest.fixture(params=["on_disk", pytest.param("in_a_bucket", marks=pytest.mark.contract)])
def blobs(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def files(blobs):
    return RunFiles(blobs, PREFIX)


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "made"
    (made / "inner").mkdir(parents=True)
    (made / "weights.bin").write_bytes(b"w" * 100_000)
    (made / "inner" / "state.json").write_bytes(b"{}")
    return made


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_file_is_overwritten_and_read_back(files):
    assert files.read("progress.json") is None
    files.write("progress.json", b"1")
    files.write("progress.json", b"22")
    assert files.read("progress.json") == b"22"


def test_a_folder_comes_back_as_it_went(files, folder, tmp_path):
    sent = files.upload_folder(folder, "checkpoints/step-7")
    got = files.download_folder("checkpoints/step-7", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(folder)
    assert sent == got == hashlib.sha256(files.read(f"checkpoints/step-7/{MANIFEST}")).hexdigest()


def test_the_hash_changes_with_one_byte(files, folder):
    before = files.upload_folder(folder, "model")
    (folder / "inner" / "state.json").write_bytes(b"[]")
    assert files.upload_folder(folder, "model") != before


@pytest.mark.parametrize(
    "damage",
    [
        lambda files: files.write("model/weights.bin", b"w" * 99_999 + b"x"),
        lambda files: files.write("model/weights.bin", b"w" * 5),
        lambda files: files._blobs.delete(f"{PREFIX}/model/inner/state.json"),
        lambda files: files._blobs.delete(f"{PREFIX}/model/{MANIFEST}"),
        lambda files: files.write(f"model/{MANIFEST}", b'{"weights.bin": {"sha'),
        lambda files: files.write(f"model/{MANIFEST}", b'{"weights.bin": 3}'),
        lambda files: files.write(
            f"model/{MANIFEST}", json.dumps({"../out": {"sha256": "", "bytes": 0}}).encode()
        ),
    ],
    ids=["changed", "cut", "lost", "no manifest", "cut manifest", "wrong manifest", "leads out"],
)
def test_damage_is_found_and_nothing_is_left(files, folder, tmp_path, damage):
    files.upload_folder(folder, "model")
    damage(files)
    with pytest.raises(TrainingFailed) as caught:
        files.download_folder("model", tmp_path / "back")
    assert caught.value.problem_code == "checkpoint-invalid"
    assert not (tmp_path / "back").exists()
    assert not (tmp_path / "out").exists()


def test_only_folders_with_a_manifest_are_whole_and_the_newest_step_is_last(files, folder):
    for step in (100, 20, 3):
        files.upload_folder(folder, f"checkpoints/step-{step}")
    files.write("checkpoints/step-500/weights.bin", b"killed before the manifest")
    files.upload_folder(folder, "model")
    assert files.complete_folders("checkpoints") == [
        "checkpoints/step-3",
        "checkpoints/step-20",
        "checkpoints/step-100",
    ]
    assert files.folders("checkpoints")[-1] == "checkpoints/step-500"
    assert files.complete_folders("nothing") == files.folders("nothing") == []


def test_an_upload_in_place_of_another_is_not_whole_before_its_end(files, folder, monkeypatch):
    files.upload_folder(folder, "checkpoints/step-1")
    write = files._blobs.create

    def dies_at_the_weights(key):
        if key.endswith("weights.bin"):
            raise KeyboardInterrupt
        return write(key)

    monkeypatch.setattr(files._blobs, "create", dies_at_the_weights)
    with pytest.raises(KeyboardInterrupt):
        files.upload_folder(folder, "checkpoints/step-1")
    assert files.complete_folders("checkpoints") == []


def test_a_store_that_keeps_less_than_it_was_given_is_found_out(files, folder, monkeypatch):
    monkeypatch.setattr(files._blobs, "size", lambda key: 1)
    with pytest.raises(TrainingFailed, match="did not keep"):
        files.upload_folder(folder, "model")
    assert files.complete_folders("model") == []


def test_a_deleted_folder_leaves_its_neighbours(files, folder):
    files.upload_folder(folder, "checkpoints/step-1")
    files.upload_folder(folder, "checkpoints/step-10")
    files.delete_folder("checkpoints/step-1")
    files.delete_folder("checkpoints/step-1")
    assert files.complete_folders("checkpoints") == ["checkpoints/step-10"]
    assert files.read("checkpoints/step-1/weights.bin") is None


def test_what_a_killed_upload_left_is_no_blob_and_goes_with_its_folder(tmp_path, folder):
    blobs = BlobStore.in_folder(tmp_path / "blobs")
    files = RunFiles(blobs, PREFIX)
    files.upload_folder(folder, "model")
    half = tmp_path / "blobs" / PREFIX / "model" / ".weights.bin.part"
    half.write_bytes(b"half")
    assert [key.rpartition("/")[2] for key in blobs.keys_below(f"{PREFIX}/model")] == [
        "state.json",
        "manifest.json",
        "weights.bin",
    ]
    files.delete_folder("model")
    assert not half.exists()
