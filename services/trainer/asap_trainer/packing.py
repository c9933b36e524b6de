"""Several samples in one row: which ones, and how none of them sees another."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from asap.sft import IGNORED, SftExample

__all__ = ["PackedRow", "pack", "packed_row"]


class PackedRow(NamedTuple):
    """One row of a packed batch; three lists of one length."""

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]
    """Counted from 0 within each sample: attention kernels find the samples by them."""


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices into `lengths`, none longer than `capacity` in sum (best fit decreasing).

    Every index stands in one row. At most 11/9 of the fewest rows possible, plus one. Equal input
    gives equal rows. Time O(n log n + n log capacity), memory O(n + capacity).

    Raises ValueError for a length below 1 or above the capacity.
    """
    if lengths and not 1 <= min(lengths) <= max(lengths) <= capacity:
        raise ValueError(f"lengths must lie between 1 and the capacity of {capacity}")
    rows: list[list[int]] = []
    by_room: defaultdict[int, list[int]] = defaultdict(list)
    rooms = _Rooms(capacity)
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        room = rooms.smallest(lengths[index])
        if room is None:
            room, row = capacity, len(rows)
            rows.append([])
        else:
            row = by_room[room].pop()
            if not by_room[room]:
                rooms.set(room, False)
        rows[row].append(index)
        left = room - lengths[index]
        if left:
            by_room[left].append(row)
            rooms.set(left, True)
    return rows


class _Rooms:
    """A set of whole numbers from 1 to `largest` that knows its smallest member from a bound on:
    a tree whose nodes say the largest member below them.
    """

    def __init__(self, largest: int) -> None:
        self._leaves = 1 << largest.bit_length()
        self._tree = [0] * (2 * self._leaves)

    def set(self, number: int, present: bool) -> None:
        node = self._leaves + number
        self._tree[node] = number if present else 0
        while node > 1:
            node //= 2
            self._tree[node] = max(self._tree[2 * node], self._tree[2 * node + 1])

    def smallest(self, bound: int) -> int | None:
        """The smallest member that is not below `bound`."""
        if self._tree[1] < bound:
            return None
        node = 1
        while node < self._leaves:
            node = 2 * node if self._tree[2 * node] >= bound else 2 * node + 1
        return self._tree[node]


def packed_row(examples: Sequence[SftExample]) -> PackedRow:
    """The samples one behind the other. The first token of each carries no loss: it would be
    predicted from the neighbour.
    """
    row = PackedRow([], [], [])
    for example in examples:
        row.input_ids.extend(example.input_ids)
        row.labels.extend((IGNORED, *example.labels[1:]))
        row.position_ids.extend(range(len(example.input_ids)))
    return row
