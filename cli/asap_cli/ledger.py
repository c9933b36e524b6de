"""The ledger of a run: every input line that gave no record, with its number and the reason."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from asap.errors import AsapError
from asap.types import Triple

__all__ = ["Rejected", "ledger_path", "write_ledger"]


@dataclass(frozen=True, slots=True)
class Rejected:
    """One rejected line."""

    line: int
    id: str | None
    code: str
    detail: str

    @classmethod
    def of(cls, line: int, error: AsapError, triple: Triple | None = None) -> Self:
        """The entry for an error met on a line."""
        return cls(line, triple.id if triple else None, error.problem_code, error.detail)


def ledger_path(out: Path) -> Path:
    """Where the ledger of a run that writes `out` lies: beside it."""
    return out.with_name(f"{out.name}.rejected.jsonl")


def write_ledger(out: Path, rejected: Sequence[Rejected]) -> None:
    """Write the ledger in the order of lines; without entries there is no file."""
    path = ledger_path(out)
    path.unlink(missing_ok=True)
    if rejected:
        lines = [json.dumps(asdict(r)) for r in sorted(rejected, key=lambda r: r.line)]
        path.write_text("\n".join(lines) + "\n")
