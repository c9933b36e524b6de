"""Packing: every sample once, full rows, and no sample that sees its neighbour."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asap.sft import IGNORED, SftExample
from asap_trainer.packing import pack, packed_row

CAPACITY = 40
lengths = st.lists(st.integers(1, CAPACITY), max_size=60)


def first_fit(lengths, capacity) -> int:
    rooms = []
    for length in lengths:
        fitting = next((row for row, room in enumerate(rooms) if room >= length), None)
        if fitting is None:
            rooms.append(capacity - length)
        else:
            rooms[fitting] -= length
    return len(rooms)


def best_fit_decreasing(lengths, capacity) -> list[int]:
    """Sums of the rows, by looking at every row for every sample."""
    sums = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, used in enumerate(sums) if used + length <= capacity]
        if fitting:
            sums[max(fitting, key=lambda row: sums[row])] += length
        else:
            sums.append(length)
    return sums


@given(lengths)
def test_every_sample_stands_in_one_row_that_is_not_too_long(lengths):
    rows = pack(lengths, CAPACITY)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[i] for i in row) <= CAPACITY for row in rows)


@given(lengths)
def test_is_best_fit_decreasing(lengths):
    sums = [sum(lengths[i] for i in row) for row in pack(lengths, CAPACITY)]
    assert sorted(sums) == sorted(best_fit_decreasing(lengths, CAPACITY))
    emptiest = sorted(sums)[:2]
    assert len(emptiest) < 2 or sum(emptiest) > CAPACITY  # no two rows could be one


@given(lengths, st.integers(1, 1000))
def test_equal_input_gives_equal_rows_at_any_scale(lengths, scale):
    scaled = [length * scale for length in lengths]
    assert pack(scaled, CAPACITY * scale) == pack(lengths, CAPACITY)


def test_packs_real_traces_no_worse_than_first_fit(real_traces):
    lengths = [min(16384, len(trace["cot"]) // 3 + 1) for trace in real_traces]
    rows = pack(lengths, 16384)
    assert len(lengths) == 469
    assert len(rows) <= first_fit(lengths, 16384)
    assert sum(lengths) / (len(rows) * 16384) > 0.99


@pytest.mark.parametrize("lengths", [[0], [CAPACITY + 1], [3, -1]])
def test_refuses_what_fits_no_row(lengths):
    with pytest.raises(ValueError, match="between 1 and"):
        pack(lengths, CAPACITY)


def test_nothing_to_pack():
    assert pack([], CAPACITY) == []
    assert packed_row([]) == ([], [], [])


def test_no_sample_is_predicted_from_its_neighbour():
    row = packed_row(
        [
            SftExample("a", (0, 5, 6, 1), (IGNORED, IGNORED, 6, 1)),
            SftExample("b", (0, 7, 1), (0, 7, 1)),  # loss on all
        ]
    )
    assert row.input_ids == [0, 5, 6, 1, 0, 7, 1]
    assert row.labels == [IGNORED, IGNORED, 6, 1, IGNORED, 7, 1]
    assert row.position_ids == [0, 1, 2, 3, 0, 1, 2]
