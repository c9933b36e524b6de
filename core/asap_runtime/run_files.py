"""The files of a training run in the blob store, alone and as folders with a manifest.

A folder is whole when its manifest is there, which is written last, and good when every file has
the hash that stands in it. Knows keys and hashes, nothing of what the files say.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from asap.errors import NotFound, TrainingFailed
from asap_runtime.blobs import BlobStore

__all__ = ["MANIFEST", "RunFiles"]

MANIFEST = "manifest.json"
COPY = 8 * 2**20
"""Bytes of a file that are in memory at a time."""
_STEP = re.compile(r"\d+")


class RunFiles:
    """Everything of one run. Blocking; safe to share between threads.

    Every method may raise StorageFull, or UpstreamUnavailable (`blob-unavailable`).

    Args:
        blobs: the store.
        prefix: of the run, without a slash at its end.
    """

    def __init__(self, blobs: BlobStore, prefix: str) -> None:
        self._blobs, self._prefix = blobs, prefix

    def write(self, name: str, data: bytes) -> None:
        """Write one file, in place of what was there; readers see the old bytes or the new."""
        with self._blobs.create(self._key(name)) as writer:
            writer.write(data)

    def read(self, name: str) -> bytes | None:
        """The bytes of one file; None when there is none."""
        try:
            with self._blobs.open(self._key(name)) as stream:
                return stream.read()
        except NotFound:
            return None

    def delete(self, name: str) -> None:
        """Delete one file; without effect when it is gone."""
        self._blobs.delete(self._key(name))

    def upload_folder(self, folder: Path, name: str) -> str:
        """Store all files of `folder` below `name`, each in place of an older one.

        Returns the SHA-256 of the manifest, which changes with every byte of the folder. Raises
        TrainingFailed (`checkpoint-invalid`) when the store did not keep what it was given.
        """
        # A manifest of before would call the mixture of old and new files whole.
        self._blobs.delete(self._key(f"{name}/{MANIFEST}"))
        entries = {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            inside = path.relative_to(folder).as_posix()
            if inside == MANIFEST:
                continue
            with path.open("rb") as source, self._blobs.create(self._key(f"{name}/{inside}")) as to:
                while block := source.read(COPY):
                    to.write(block)
            if self._blobs.size(self._key(f"{name}/{inside}")) != to.size:
                raise _invalid(f"{name}: the store did not keep all of {inside!r}")
            entries[inside] = {"sha256": to.sha256, "bytes": to.size}
        manifest = json.dumps(entries, indent=1, sort_keys=True).encode()
        self.write(f"{name}/{MANIFEST}", manifest)
        return hashlib.sha256(manifest).hexdigest()

    def download_folder(self, name: str, folder: Path) -> str:
        """Fetch all files of the manifest to `folder`, which is made; what lay there goes.

        Returns the SHA-256 of the manifest. Raises TrainingFailed (`checkpoint-invalid`),
        leaving no folder, when something is missing or has another hash or size.
        """
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            manifest = self.read(f"{name}/{MANIFEST}")
            if manifest is None:
                raise _invalid(f"{name} has no {MANIFEST}; it was never completed")
            for inside, entry in _entries(name, manifest):
                self._fetch(name, inside, entry, folder / inside)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return hashlib.sha256(manifest).hexdigest()

    def complete_folders(self, name: str) -> list[str]:
        """Names, `name/…`, of the folders in `name` that have a manifest; highest number last."""
        return [
            folder for folder in self.folders(name) if self.read(f"{folder}/{MANIFEST}") is not None
        ]

    def folders(self, name: str) -> list[str]:
        """Names of all folders in `name`, whole or not, in the same order."""
        below = f"{self._key(name)}/"
        inside = (key.removeprefix(below) for key in self._blobs.keys_below(self._key(name)))
        names = {path.partition("/")[0] for path in inside if "/" in path}
        return sorted((f"{name}/{folder}" for folder in names), key=_order)

    def delete_folder(self, name: str) -> None:
        """Delete a folder; without effect when it is gone. It is not whole from the start on."""
        self._blobs.delete(self._key(f"{name}/{MANIFEST}"))
        self._blobs.delete_below(self._key(name))

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def _fetch(self, name: str, inside: str, entry: Mapping[str, Any], path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        digest, size = hashlib.sha256(), 0
        try:
            with self._blobs.open(self._key(f"{name}/{inside}")) as source, path.open("wb") as to:
                while block := source.read(COPY):
                    to.write(block)
                    digest.update(block)
                    size += len(block)
        except NotFound as error:
            raise _invalid(f"{name} lacks the file {inside!r}") from error
        if (digest.hexdigest(), size) != (entry["sha256"], entry["bytes"]):
            raise _invalid(f"{name}: the file {inside!r} is not the one of its manifest")


def _entries(name: str, manifest: bytes) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Paths inside of the folder, with hash and size."""
    with suppress(ValueError):  # also of undecodable bytes
        entries = json.loads(manifest)
        if isinstance(entries, dict) and all(map(_sound, entries.items())):
            yield from entries.items()
            return
    raise _invalid(f"{name}: its {MANIFEST} cannot be read")


def _sound(item: tuple[str, Any]) -> bool:
    path, entry = PurePosixPath(item[0]), item[1]
    inside = not path.is_absolute() and ".." not in path.parts
    return inside and isinstance(entry, dict) and {"sha256", "bytes"} <= entry.keys()


def _order(name: str) -> tuple[int, str]:
    numbers = _STEP.findall(name.rpartition("/")[2])
    return (int(numbers[-1]) if numbers else -1, name)


def _invalid(detail: str) -> TrainingFailed:
    return TrainingFailed(detail, code="checkpoint-invalid")
