"""Completions that somebody has made: a file of JSON lines with `task_id` and `completion`."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from asap.errors import InvalidInput, NotFound
from asap.eval_items import EvalItem
from asap.problems import Sample
from asap_runtime.datasets import read_lines

__all__ = ["Completions"]


class _Row(BaseModel):
    """A line; what it does not say is 0 in the report."""

    model_config = ConfigDict(extra="ignore")

    task_id: str
    completion: str
    budget: int | None = Field(None, ge=1)
    completion_tokens: int = Field(0, ge=0)
    finish_reason: str = "stop"
    seconds: float = Field(0.0, ge=0)


@dataclass(frozen=True, slots=True)
class Completions:
    """The rows of a file by task id."""

    name: str
    rows: dict[str, list[_Row]]
    sha256: str
    """Of the file."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read .jsonl, .jsonl.gz or .parquet. Raises NotFound, InvalidInput with the line."""
        rows: dict[str, list[_Row]] = {}
        for line in read_lines(str(path)):
            if line.error is not None:
                raise line.error
            row = _row(line.row, line.number)
            rows.setdefault(row.task_id, []).append(row)
        if not rows:
            raise InvalidInput(f"{str(path)!r} holds no completion")
        try:
            with path.open("rb") as stream:
                sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise NotFound(f"{str(path)!r} cannot be read: {error.strerror}") from error
        return cls(str(path), rows, sha256)

    def fill(self, item: EvalItem) -> EvalItem:
        """The item with its completions, in the file's order; as it is when it has them."""
        if item.samples:
            return item
        numbers: Counter[int] = Counter()
        samples = []
        for row in self._of(item):
            budget = row.budget or max(item.budgets)
            samples.append(
                Sample(
                    task_id=row.task_id,
                    number=numbers[budget],
                    budget=budget,
                    text=row.completion,
                    completion_tokens=row.completion_tokens,
                    prompt_tokens=0,
                    finish_reason=row.finish_reason,
                    started_at=0.0,
                    seconds=row.seconds,
                )
            )
            numbers[budget] += 1
        return item.grown(samples=tuple(samples))

    def beside(self, items: list[EvalItem]) -> list[str]:
        """The tasks that are not among these items'. Raises InvalidInput when none is."""
        known = {problem.task_id for item in items for problem in item.problems}
        if not known & self.rows.keys():
            raise InvalidInput(
                f"none of the {len(self.rows)} tasks of {self.name!r} is one of the benchmark's, "
                f"such as {min(known)!r}"
            )
        return sorted(self.rows.keys() - known)

    def _of(self, item: EvalItem) -> list[_Row]:
        for problem in item.problems:
            if problem.task_id in self.rows:
                return self.rows[problem.task_id]
        return []


def _row(row: Any, number: int) -> _Row:
    try:
        return _Row.model_validate(row)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise InvalidInput(f"line {number}: {field}: {first['msg']}", line=number) from None
