"""The journal of a run: each record appended when it is done, so that a killed run loses nothing.

One line a record, behind its content key. The last line of a killed run may be cut; it is dropped.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from pathlib import Path
from typing import IO

from asap.errors import Misconfigured
from asap.types import Record

_PREFIX, _KEY_CHARS = '{"key": "', 64


class Journal:
    """Finished records by key, on disk. In memory: 100 bytes a record."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offsets: dict[str, int] = {}
        self._stream: IO[bytes] = path.open("a+b")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._stream.close()
            raise Misconfigured(
                f"another run is writing the journal {str(path)!r}; wait for it or name another OUT"
            ) from None
        self._load()
        self.resumed = len(self._offsets)

    @staticmethod
    def path_for(out: Path) -> Path:
        """Where the journal of a run that writes `out` lies."""
        return out.with_name(f".{out.name}.journal")

    def __len__(self) -> int:
        return len(self._offsets)

    def __contains__(self, key: str) -> bool:
        return key in self._offsets

    def __getitem__(self, key: str) -> Record:
        self._stream.seek(self._offsets[key])
        line = self._stream.readline()
        return Record.model_validate(json.loads(line)["record"])

    def append(self, key: str, record: Record) -> None:
        """Add a finished record; it is with the operating system when this returns."""
        self._stream.seek(0, 2)
        self._offsets[key] = self._stream.tell()
        line = f'{_PREFIX}{key}", "record": {record.model_dump_json()}}}\n'
        self._stream.write(line.encode())
        self._stream.flush()

    def close(self, *, delete: bool) -> None:
        """Close; a finished run deletes its journal."""
        self._stream.close()
        if delete:
            self._path.unlink()

    def _load(self) -> None:
        self._stream.seek(0)
        end = 0
        for line in self._stream:
            if not line.endswith(b"}\n"):
                break
            self._offsets[line[len(_PREFIX) :][:_KEY_CHARS].decode()] = end
            end += len(line)
        self._stream.truncate(end)


def content_key(record: Record, engines: str) -> str:
    """SHA-256 over the triple, the configuration and the names of the engines."""
    triple = record.triple.model_dump_json()
    return hashlib.sha256(
        "\n".join((triple, record.config.hash(), engines)).encode(errors="surrogatepass")
    ).hexdigest()
