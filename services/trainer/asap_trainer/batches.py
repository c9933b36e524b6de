"""Samples as a data set and as batches of tensors: what both backends are given, token for token.

Nothing is tokenised, cut or masked here. Padding is told by position, never by id.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from asap.sft import IGNORED, SftExample
from asap_trainer.packing import pack, packed_row

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["collate", "collate_packed", "dataset_of", "rows_of", "total_steps"]

PADDING = 0
"""Id in places that no attention mask lets anybody see and whose labels are ignored."""

Row = Mapping[str, Sequence[int]]
Batch = dict[str, "Tensor"]


def rows_of(lengths: Sequence[int], capacity: int, *, packing: bool) -> list[list[int]]:
    """Which samples stand in which row: one in each, or several that fill `capacity` together."""
    return pack(lengths, capacity) if packing else [[index] for index in range(len(lengths))]


def total_steps(
    rows: int, *, batch: int, accumulation: int, epochs: float, max_steps: int | None
) -> int:
    """Optimiser steps of a run; each epoch ends with a step, however few rows are left for it.

    Args:
        rows: of an epoch.
        batch: rows in one pass, over all devices.
        accumulation: passes in a step.
        epochs: over the rows.
        max_steps: instead of epochs.
    """
    if max_steps is not None:
        return max_steps
    passes = -(-rows // batch)
    return -int(-epochs * -(-passes // accumulation) // 1)


def dataset_of(examples: Sequence[SftExample], rows: Sequence[Sequence[int]]) -> Any:
    """A data set of `datasets` whose rows are put together when they are asked for.

    Rows of one sample have input_ids and labels, packed ones position_ids as well.
    """
    from datasets import Dataset

    numbers = Dataset.from_dict({"row": list(range(len(rows)))})
    return numbers.with_transform(_LookUp(examples, rows))


class _LookUp:
    """Numbers of rows to rows. Hashed by type alone: the library would hash all of the tokens."""

    def __init__(self, examples: Sequence[SftExample], rows: Sequence[Sequence[int]]) -> None:
        self._examples, self._rows = examples, rows
        self._packed = any(len(row) > 1 for row in rows)

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __call__(self, batch: Mapping[str, Sequence[int]]) -> dict[str, list[list[int]]]:
        packed = [
            packed_row([self._examples[index] for index in self._rows[row]])._asdict()
            for row in batch["row"]
        ]
        names = ("input_ids", "labels", "position_ids")[: 3 if self._packed else 2]
        return {name: [row[name] for row in packed] for name in names}


def collate(rows: Sequence[Row]) -> Batch:
    """int64 (rows, longest) of each, padded on the right; labels of padding are ignored."""
    import torch

    width = max(len(row["input_ids"]) for row in rows)

    def filled(parts: Callable[[Row], Sequence[int]], filling: int) -> Tensor:
        return torch.tensor(
            [[*parts(row), *[filling] * (width - len(row["input_ids"]))] for row in rows]
        )

    return {
        "input_ids": filled(lambda row: row["input_ids"], PADDING),
        "labels": filled(lambda row: row["labels"], IGNORED),
        "attention_mask": filled(lambda row: [1] * len(row["input_ids"]), 0),
    }


def collate_packed(rows: Sequence[Row]) -> Batch:
    """int64 (1, all tokens) of each. Positions start again at each sample, and attention goes by
    them alone: a mask would hide where one ends.
    """
    import torch

    names = ("input_ids", "labels", "position_ids")
    return {name: torch.tensor([[one for row in rows for one in row[name]]]) for name in names}
