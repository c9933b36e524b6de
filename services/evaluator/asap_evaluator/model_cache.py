"""The directory of an item's model: local, of the hub, or fetched once from the registry.

Fetched models lie below the hash of their manifest, so that a name that comes to mean another model
is never taken for the old one; the ones used last are kept.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from asap.errors import TrainingFailed
from asap_evaluator.settings import check_model
from asap_runtime.blobs import BlobStore
from asap_runtime.model_files import locate_model
from asap_runtime.models import ModelRegistry, parse_reference
from asap_runtime.run_files import RunFiles

__all__ = ["ModelCache"]


class ModelCache:
    """Models below one folder. Blocking; safe to share between threads and processes.

    Args:
        folder: of the fetched models.
        allowed: the only folder whose models may be named by their path; None: none may.
        kept: fetched models that stay.
    """

    def __init__(
        self,
        folder: Path,
        *,
        blobs: BlobStore,
        registry: ModelRegistry,
        allowed: Path | None = None,
        kept: int = 3,
    ) -> None:
        self._folder, self._blobs, self._registry = folder, blobs, registry
        self._allowed, self._kept = allowed, kept

    def locate(self, tenant: str, model: str) -> Path:
        """The directory with config, weights and tokenizer of a hub name, a directory, "demo", or
        `name@version` of the tenant's registry.

        Raises InvalidInput for a path that is not allowed, NotFound, Misconfigured for a model that
        is no model, TrainingFailed (`checkpoint-invalid`) when the registry's files are damaged.
        """
        check_model(model, self._allowed)
        reference = parse_reference(model)
        if reference is None:
            return locate_model(model, weights=True)
        version = self._registry.get(tenant, *reference)
        folder = self._folder / version.manifest_sha256
        if not folder.is_dir():
            self._fetch(version.prefix, version.manifest_sha256, folder)
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
