"""The directory of an item's model: local, of the hub, or fetched once from the registry.

Fetched models lie below the hash of their manifest, so that a name that comes to mean another model
is never taken for the old one; the ones used last are kept.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from asap.errors import TrainingFailed
from asap_evaluator.settings import check_model
from asap_runtime.blobs import BlobStore
from asap_runtime.model_files import locate_model
from asap_runtime.run_files import RunFiles

__all__ = ["ModelCache", "ModelSource"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What an item names: a hub name, "demo" or a directory; of the registry with the place of its
    files in the blob store and the hash of their manifest.
    """

    name: str
    prefix: str | None = None
    sha256: str | None = None


class ModelCache:
    """Models below one folder. Blocking; safe to share between threads and processes.

    Args:
        folder: of the fetched models.
        allowed: the only folder whose models may be named by their path; None: none may.
        kept: fetched models that stay.
    """

    def __init__(
        self, folder: Path, blobs: BlobStore, *, allowed: Path | None = None, kept: int = 3
    ) -> None:
        self._folder, self._blobs, self._allowed, self._kept = folder, blobs, allowed, kept

    def locate(self, model: ModelSource) -> Path:
        """The directory with config, weights and tokenizer.

        Raises InvalidInput for a path that is not allowed, Misconfigured for what is no model,
        TrainingFailed (`checkpoint-invalid`) when the registry's files are damaged or gone.
        """
        if model.prefix is None or model.sha256 is None:
            check_model(model.name, self._allowed)
            return locate_model(model.name, weights=True)
        folder = self._folder / model.sha256
        if not folder.is_dir():
            self._fetch(model.prefix, model.sha256, folder)
        os.utime(folder)
        self._forget()
        return locate_model(str(folder), weights=True)

    def _fetch(self, prefix: str, sha256: str, folder: Path) -> None:
        run, _, name = prefix.rpartition("/")
        part = folder.with_name(f".{uuid4().hex}")
        try:
            if RunFiles(self._blobs, run).download_folder(name, part) != sha256:
                raise TrainingFailed(
                    "the model's files are not those of the registry", code="checkpoint-invalid"
                )
            with suppress(OSError):  # another worker was first: the files are the same
                part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _forget(self) -> None:
        fetched = sorted(self._folder.glob("[0-9a-f]*"), key=lambda path: path.stat().st_mtime)
        for folder in fetched[: -self._kept]:
            shutil.rmtree(folder, ignore_errors=True)
