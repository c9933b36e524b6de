"""Replies kept on disk under the hash of what was asked, so that no call is ever paid for twice.

Knows neither the server nor the meaning of a reply. Errors are never kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from asap.errors import Misconfigured
from asap.ports import ChatResult, Sampling
from asap.types import Usage

__all__ = ["ReplyCache", "reply_key", "write_whole"]

_FORMAT: Final = 1
"""Part of every key: a new format finds none of the old files instead of misreading them."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = _FORMAT
    text: str
    finish_reason: str
    usage: Usage


def reply_key(model: str, prompt: str, sampling: Sampling) -> str:
    """SHA-256 over all that decides a reply; `sampling.seed` tells the attempts apart."""
    question = {
        "format": _FORMAT,
        "model": model,
        "prompt": prompt,
        # All fields, also those that a later version of the port adds.
        "sampling": asdict(sampling),
    }
    canonical = json.dumps(question, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


class ReplyCache:
    """One JSON file per reply, in 256 folders by the first two digits of the key.

    Safe with several processes on one directory: a file appears whole or not at all. Replies hold
    users' text, so files are for the owner only (0600). The directory is made on the first write.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def get(self, key: str) -> ChatResult | None:
        """The kept reply, identical to what was put; None when there is none that can be read."""
        try:
            entry = _Entry.model_validate_json(self._path(key).read_bytes())
        except (OSError, ValidationError):
            # Half-written by an older system, damaged, or foreign: ask again, and replace it.
            return None
        return ChatResult(text=entry.text, finish_reason=entry.finish_reason, usage=entry.usage)

    def put(self, key: str, result: ChatResult) -> None:
        """Keep `result`. Raises Misconfigured when the directory cannot be written."""
        entry = _Entry(text=result.text, finish_reason=result.finish_reason, usage=result.usage)
        try:
            write_whole(self._path(key), entry.model_dump_json().encode())
        except OSError as error:
            raise Misconfigured(
                f"The reply cache cannot be written ({error.strerror}): make room, make "
                f"{self._directory} writable, or name another directory.",
                directory=str(self._directory),
            ) from error

    def _path(self, key: str) -> Path:
        return self._directory / key[:2] / f"{key}.json"


def write_whole(path: Path, content: bytes) -> None:
    """Write to a temporary neighbour (mode 0600), then rename, which is atomic in one directory."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
