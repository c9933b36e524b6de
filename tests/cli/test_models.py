from __future__ import annotations

import hashlib
import json
import os
import shutil

import pytest

from asap_runtime.blobs import BlobStore
from asap_runtime.database import Database, open_engine
from asap_runtime.model_files import locate_model
from asap_runtime.models import ModelRegistry
from asap_runtime.run_files import RunFiles
from live_server import live_server

PREFIX = "local/runs/one/model"


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("ASAP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ASAP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def server(tmp_path, monkeypatch):
    with live_server(tmp_path / "home") as live:
        monkeypatch.setenv("ASAP_SERVER", live.url)
        yield live


@pytest.fixture
def registry(tmp_path):
    database = Database(open_engine(f"sqlite:///{tmp_path / 'home' / 'asap.db'}"))
    yield ModelRegistry(database)
    database.close()


def add(registry, job_id, name="asap-7b", sha256="5" * 64):
    return registry.add(
        "local", name, prefix=PREFIX, manifest_sha256=sha256, base="demo", job_id=job_id,
        meta={"loss": 1.25, "note": "red \x1b[31m"},
    )  # fmt: skip


def test_versions_are_listed_shown_moved_and_deleted(asap, server, registry):
    for job_id in ("a", "b"):
        add(registry, job_id)
    add(registry, "c", name="another")
    ran = asap("models", "list")
    assert [line.split()[0] for line in ran.out.splitlines()[1:]] == [
        "another@1", "asap-7b@2", "asap-7b@1",
    ]  # fmt: skip
    ran = asap("models", "list", "--name", "asap-7b", "--limit", 1)
    assert [line.split()[0] for line in ran.out.splitlines()[1:]] == ["asap-7b@2"]
    assert "--limit shows more" in ran.err

    assert "asap-7b@2" in asap("models", "show", "asap-7b").out
    assert asap("models", "stage", "asap-7b@1", "production").code == 0
    ran = asap("models", "show", "asap-7b")
    for words in ("asap-7b@1", "production", "1.25", "5" * 64):
        assert words in ran.out
    assert "\x1b" not in ran.out

    ran = asap("models", "remove", "asap-7b@1")
    assert ran.code == 65
    assert "is in production" in ran.err
    assert asap("models", "remove", "asap-7b@2").code == 0
    assert asap("models", "show", "asap-7b@2").code == 66
    assert "asap-7b@2" not in asap("models", "list").out


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["show", "none"], 66),
        (["show", "a/../../jobs"], 66),
        (["show", "one@x"], 65),
        (["remove", "one"], 65),
        (["stage", "none@1", "staging"], 66),
    ],
)
def test_what_is_no_model_is_refused(asap, server, command, code):
    ran = asap("models", *command)
    assert ran.code == code
    assert ran.err.startswith("asap: ")


def test_a_model_of_this_machine_is_copied_checked_and_named_by_its_hash(asap, tmp_path):
    ran = asap("models", "fetch", "demo", "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    sha256 = ran.out.strip()
    manifest = (tmp_path / "out" / "manifest.json").read_bytes()
    assert sha256 == hashlib.sha256(manifest).hexdigest()
    for name, entry in json.loads(manifest).items():
        data = (tmp_path / "out" / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert locate_model(str(tmp_path / "out"), weights=True)
    again = asap("models", "fetch", tmp_path / "out", "-o", tmp_path / "copy", "--sha256", sha256)
    assert again.out.strip() == sha256, "of the same files it is the same, wherever they lie"


def test_the_hash_is_that_of_the_registry(asap, registry_model, tmp_path):
    sha256 = registry_model
    ran = asap("models", "fetch", "tiny@1", "-o", tmp_path / "out", "--sha256", sha256)
    assert (ran.code, ran.out.strip()) == (0, sha256), ran.err
    uri = f"file://{tmp_path}/home/blobs/{PREFIX}"
    ran = asap("models", "fetch", uri, "-o", tmp_path / "other", "--sha256", sha256)
    assert (ran.code, ran.out.strip()) == (0, sha256), ran.err
    assert asap("models", "fetch", "file:///etc", "-o", tmp_path / "no").code == 66
    assert asap("models", "fetch", "tiny@2", "-o", tmp_path / "no").code == 66
    assert not (tmp_path / "no").exists()


@pytest.fixture
def registry_model(asap, registry, tmp_path):
    """A model of the registry; its hash."""
    assert asap("db", "upgrade").code == 0
    ignored = shutil.ignore_patterns("*.py", "__pycache__")
    shutil.copytree(locate_model("demo", weights=True), tmp_path / "demo", ignore=ignored)
    files = RunFiles(BlobStore.in_folder(tmp_path / "home" / "blobs"), PREFIX.rpartition("/")[0])
    sha256 = files.upload_folder(tmp_path / "demo", "model")
    add(registry, "a", name="tiny", sha256=sha256)
    return sha256


def test_what_is_there_is_only_checked_and_what_is_damaged_is_fetched_again(asap, tmp_path):
    out = tmp_path / "out"
    sha256 = asap("models", "fetch", "demo", "-o", out).out.strip()
    before = (out / "config.json").stat().st_ino
    assert asap("models", "fetch", "owner/unreachable", "-o", out, "--sha256", sha256).code == 0
    assert (out / "config.json").stat().st_ino == before
    (out / "config.json").write_text("{}")
    ran = asap("models", "fetch", "owner/unreachable", "-o", out, "--sha256", sha256)
    assert ran.code == 78, "the damage is seen"
    assert asap("models", "fetch", "demo", "-o", out, "--sha256", sha256).out.strip() == sha256
    assert (out / "config.json").stat().st_size > 2
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_other_files_than_were_asked_for_leave_no_folder(asap, tmp_path):
    ran = asap("models", "fetch", "demo", "-o", tmp_path / "out", "--sha256", "0" * 64)
    assert ran.code == 65
    assert "was asked for" in ran.err
    assert not (tmp_path / "out").exists()


def test_pickled_weights_are_never_copied(asap, tmp_path):
    source = shutil.copytree(locate_model("demo", weights=True), tmp_path / "source")
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (source / "modeling.py").write_text("raise SystemExit")
    assert asap("models", "fetch", source, "-o", tmp_path / "out").code == 0
    assert not {"pytorch_model.bin", "modeling.py"} & set(os.listdir(tmp_path / "out"))
    (source / "model.safetensors").unlink()
    ran = asap("models", "fetch", source, "-o", tmp_path / "none")
    assert ran.code == 78
    assert "safetensors" in ran.err


def test_a_folder_of_something_else_is_left_alone(asap, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis").write_text("one")
    ran = asap("models", "fetch", "demo", "-o", tmp_path / "out")
    assert ran.code == 65
    assert (tmp_path / "out" / "thesis").read_text() == "one"


def test_waiting_for_the_schema(asap, tmp_path):
    ran = asap("db", "wait", "--timeout", "0")
    assert ran.code == 69
    assert "asap db upgrade" in ran.err
    assert asap("db", "upgrade").code == 0
    assert asap("db", "wait", "--timeout", "0").code == 0
