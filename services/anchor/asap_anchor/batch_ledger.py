"""What of a provider's batches must outlive the process: which are open, and which replies nobody
has paid for yet. One folder; safe with several processes on it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from asap_anchor.cache import write_whole

__all__ = ["BatchLedger", "OpenBatch"]

_FORMAT: Final = 1


class OpenBatch(BaseModel):
    """An uploaded file of requests. Without `batch` it is not known whether its batch exists."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = _FORMAT
    input_file: str
    batch: str | None = None
    keys: tuple[str, ...]
    """Reply keys of its requests."""


class BatchLedger:
    """One file per open batch, and an empty one per reply whose cost is not booked."""

    def __init__(self, folder: Path) -> None:
        self._open, self._unbooked = folder / "open", folder / "unbooked"

    def batches(self) -> list[OpenBatch]:
        """The open batches of all processes; what cannot be read is skipped."""
        found = []
        for path in sorted(self._open.glob("*.json")):
            try:
                found.append(OpenBatch.model_validate_json(path.read_bytes()))
            except (OSError, ValidationError):  # ended by another process, or foreign
                continue
        return found

    def put(self, batch: OpenBatch) -> None:
        """Keep the batch, or what is known of it now."""
        write_whole(self._path(batch), batch.model_dump_json().encode())

    def drop(self, batch: OpenBatch) -> None:
        """The batch has ended, and its replies are in the cache."""
        self._path(batch).unlink(missing_ok=True)

    def arrived(self, key: str) -> None:
        """The reply came, and no item has taken it yet."""
        write_whole(self._unbooked / key, b"")

    def book(self, key: str) -> bool:
        """Whether the caller is the one that the reply's cost is booked on."""
        try:
            (self._unbooked / key).unlink()
        except FileNotFoundError:
            return False
        return True

    def _path(self, batch: OpenBatch) -> Path:
        name = "".join(c if c.isalnum() else "-" for c in batch.input_file)
        return self._open / f"{name}.json"
