"""A model's files in one checked folder: of the hub, a directory, the registry or the blob store.

The folder's hash is that of its manifest, in the form that the registry has: the list of its files
with their sizes and hashes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from uuid import uuid4

from asap.errors import InvalidInput, Misconfigured, NotFound
from asap_cli.roles import AllSettings
from asap_runtime.blobs import open_blobs
from asap_runtime.demo_model import DEMO
from asap_runtime.host import open_database
from asap_runtime.model_files import locate_model
from asap_runtime.models import ModelRegistry, parse_reference
from asap_runtime.run_files import MANIFEST, RunFiles
from asap_runtime.settings import load_settings

__all__ = ["fetch_model", "folder_hash", "manifest_of"]

TENANT = "local"
ENDINGS = (".safetensors", ".json", ".jsonl", ".jinja", ".txt", ".model", ".md")
"""What serving needs, and what a model says of itself. Pickled weights and programs are refused."""


def fetch_model(
    model: str, out: Path, *, revision: str | None = None, sha256: str | None = None
) -> str:
    """Put the model into `out`, where it appears whole, and return its hash.

    A whole folder with that hash is not fetched again; without a hash it is taken as it is, once
    its files have proved to be those of its manifest.

    Raises InvalidInput (`model-hash`) for files with another hash, NotFound, Misconfigured for a
    model that is none, TrainingFailed (`checkpoint-invalid`) when the registry's are damaged.
    """
    there = folder_hash(out)
    if there is not None and sha256 in (None, there):
        return there
    made_here = (out / MANIFEST).is_file()
    if out.is_file() or (out.is_dir() and not made_here and any(out.iterdir())):
        raise InvalidInput(f"{str(out)!r} exists and is no folder that this command has made")
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{uuid4().hex}")
    try:
        _fill(part, model, revision)
        found = _sealed(part)
        if sha256 is not None and found != sha256:
            raise InvalidInput(
                f"the files of {model!r} have the hash {found}, and {sha256} was asked for",
                code="model-hash",
            )
        _replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return found


def folder_hash(folder: Path) -> str | None:
    """The hash of a folder that this module, or a training, has made, when every file is the one
    of its manifest; else None.
    """
    try:
        manifest = (folder / MANIFEST).read_bytes()
        entries = json.loads(manifest)
        names = [folder / name for name in entries]
        if manifest_of(folder, names) != manifest:
            return None
    except (OSError, ValueError, TypeError):
        return None
    return hashlib.sha256(manifest).hexdigest()


def manifest_of(folder: Path, paths: Iterable[Path]) -> bytes:
    """The list of these files of the folder, as `RunFiles` writes it."""
    entries = {}
    for path in paths:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        name = path.relative_to(folder).as_posix()
        entries[name] = {"sha256": digest, "bytes": path.stat().st_size}
    return json.dumps(entries, indent=1, sort_keys=True).encode()


def _fill(part: Path, model: str, revision: str | None) -> None:
    stored = "://" in model or parse_reference(model) is not None
    local = Path(model).expanduser().is_dir() or model == DEMO
    if revision is not None and (stored or local):
        raise InvalidInput(f"--revision is a commit of the hub, and {model!r} is not there")
    if stored:
        _from_store(part, model)
    elif local:
        part.mkdir()
        for path in sorted(locate_model(model, weights=True).iterdir()):
            if path.is_file() and path.name.endswith(ENDINGS) and path.name != MANIFEST:
                shutil.copyfile(path, part / path.name)
    else:
        _from_hub(part, model, revision)
    locate_model(str(part), weights=True)


def _from_hub(part: Path, model: str, revision: str | None) -> None:
    import httpx
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(
            model,
            revision=revision,
            local_dir=part,
            allow_patterns=[f"*{ending}" for ending in ENDINGS],
            ignore_patterns=["*/*"],  # other precisions and formats lie in folders
        )
    except (OSError, ValueError, httpx.HTTPError) as error:  # the hub's errors are one of these
        raise Misconfigured(
            f"model {model!r} is neither a directory nor available from the Hugging Face hub; "
            "check the name, the revision, the network and HF_TOKEN",
            model=model,
        ) from error
    shutil.rmtree(part / ".cache", ignore_errors=True)


def _from_store(part: Path, model: str) -> None:
    settings = load_settings(AllSettings)
    blobs = open_blobs(settings)
    reference = parse_reference(model)
    if reference is not None:
        database = open_database(settings)
        try:
            prefix = ModelRegistry(database).get(TENANT, *reference).prefix
        finally:
            database.close()
    else:
        root = settings.blobs_url.rstrip("/")
        if not model.startswith(f"{root}/"):
            raise NotFound(f"{model!r} is not below the blob store {root}")
        prefix = model.removeprefix(f"{root}/").rstrip("/")
    run, _, name = prefix.rpartition("/")
    RunFiles(blobs, run).download_folder(name, part)


def _sealed(part: Path) -> str:
    """The hash of the folder, whose manifest is written last."""
    files = [path for path in part.rglob("*") if path.is_file() and path.name != MANIFEST]
    unsafe = [path.name for path in files if not path.name.endswith(ENDINGS)]
    if unsafe:
        raise InvalidInput(f"the model holds {unsafe[0]!r}, which is none of {', '.join(ENDINGS)}")
    manifest = manifest_of(part, files)
    (part / MANIFEST).write_bytes(manifest)
    return hashlib.sha256(manifest).hexdigest()


def _replace(part: Path, out: Path) -> None:
    """Put the new folder in the place of the old one, if there is any."""
    old = out.with_name(f".{out.name}.{uuid4().hex}")
    if out.exists():
        out.rename(old)
    try:
        part.rename(out)
    except OSError:
        # Another process was first. What it put there counts when it is the same.
        if folder_hash(out) != folder_hash(part):
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
