from __future__ import annotations

import datetime
import decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from asap_runtime.json_lines import ReadLimits
from asap_runtime.parquet_rows import read_parquet


def write(path, rows, **options):
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def read(path, **options):
    return list(read_parquet(path, ReadLimits(), **options))


def test_rows_are_numbered_lines(tmp_path):
    rows = [{"question": f"q{i}", "cot": "é\n\n漢", "tags": ["a"], "n": i} for i in range(300)]
    path = write(tmp_path / "in.parquet", rows, row_group_size=100)
    assert [(line.number, line.row) for line in read(path)] == list(enumerate(rows, start=1))
    assert [line.number for line in read(path, after=298)] == [299, 300]
    assert read(path, after=300) == []


def test_what_json_does_not_know_is_text_or_nothing(tmp_path):
    row = {
        "nan": float("nan"),
        "when": datetime.date(2025, 1, 2),
        "price": decimal.Decimal("1.5"),
        "none": None,
    }
    [line] = read(write(tmp_path / "in.parquet", [row]))
    assert line.row == {"nan": None, "when": "2025-01-02", "price": "1.5", "none": None}


@pytest.mark.parametrize("damage", ["no parquet", "cut off", "footer", "pages"])
def test_a_file_that_cannot_be_read_is_one_fatal_line(tmp_path, damage):
    path = write(tmp_path / "in.parquet", [{"a": "text" * 100, "b": i} for i in range(1000)])
    data = bytearray(path.read_bytes())
    if damage == "no parquet":
        data = bytearray(b"PAR1 and no more")
    elif damage == "cut off":
        data = data[: len(data) // 2]
    elif damage == "footer":
        data[-8:-4] = b"\xff\xff\xff\x7f"
    else:
        data[4:400] = bytes(396)
    path.write_bytes(data)
    [line] = read(path)
    assert line.fatal
    assert line.error.problem_code == "invalid-input"
    assert line.error.detail.startswith("no readable Parquet file")


def test_columns_and_row_groups_have_limits(tmp_path):
    path = write(tmp_path / "wide.parquet", [{f"c{i}": i for i in range(1001)}])
    [line] = read(path)
    assert "1001 columns; at most 1000" in line.error.detail
    # a run of one value: a small file, large when it is expanded
    table = pa.table({"a": pa.array(["x" * 1000]).take(pa.array([0] * 1_200_000))})
    pq.write_table(table, tmp_path / "big.parquet", use_dictionary=False, compression="zstd",
                   row_group_size=1_200_000)  # fmt: skip
    assert (tmp_path / "big.parquet").stat().st_size < 2**21
    [line] = read(tmp_path / "big.parquet")
    assert "a row group of 1,2" in line.error.detail


@pytest.mark.slow
def test_a_child_that_needs_too_much_memory_ends_alone(tmp_path):
    """Little on paper: 64 rows that all name one value of 80 MB."""
    path = tmp_path / "in.parquet"
    value = pa.array(["x" * 80_000_000])
    table = pa.table({"a": pa.DictionaryArray.from_arrays(pa.array([0] * 64), value)})
    pq.write_table(table, path, compression="zstd")
    assert path.stat().st_size < 2**20
    *_, last = read(path)
    assert last.fatal


def test_the_child_is_gone_when_nobody_reads_on(tmp_path):
    path = write(tmp_path / "in.parquet", [{"a": "x" * 1000} for _ in range(20_000)])
    lines = read_parquet(path, ReadLimits())
    next(lines)
    child = lines.gi_frame.f_locals["child"]
    assert child.poll() is None
    lines.close()
    assert child.returncode is not None


def test_a_long_row_is_a_bad_line(tmp_path):
    path = write(tmp_path / "in.parquet", [{"a": "x"}, {"a": "y" * 5000}, {"a": "z"}])
    lines = list(read_parquet(path, ReadLimits(line_bytes=1000)))
    assert [line.error.problem_code if line.error else None for line in lines] == [
        None, "payload-too-large", None
    ]  # fmt: skip
