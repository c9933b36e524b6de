from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from asap.errors import InvalidInput, NotFound
from asap_runtime.datasets import count_lines, ending_of, read_lines, read_records

ROWS = [{"question": f"q{i}", "cot": "a\n\nb", "answer": "é漢"} for i in range(5)]


def write(path, rows=ROWS):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    elif path.name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz", "in.parquet", "IN.NDJSON"])
def test_reads_each_format_with_line_numbers(tmp_path, name):
    source = write(tmp_path / name)
    assert [(line.number, line.row) for line in read_lines(source)] == list(
        enumerate(ROWS, start=1)
    )
    assert count_lines(source) == 5


def test_reads_a_data_set_directory_through_the_datasets_library(tmp_path):
    write(tmp_path / "train.jsonl")
    assert [line.row["question"] for line in read_lines(f"{tmp_path}:train")] == [
        "q0", "q1", "q2", "q3", "q4"
    ]  # fmt: skip
    assert count_lines(str(tmp_path)) is None


def test_a_bad_line_does_not_stop_the_reading(tmp_path):
    path = tmp_path / "in.jsonl"
    good = json.dumps(ROWS[0]).encode()
    bad = [b"not json", b"[1]", b"\xff{}", b'{"x": NaN}', b"[" * 100_000, b'{"a": 1']
    path.write_bytes(b"\n".join([good, *bad, b"  ", good]))
    lines = list(read_lines(str(path)))
    assert [line.row is not None for line in lines] == [True, *[False] * 6, True]
    assert [line.number for line in lines] == [1, 2, 3, 4, 5, 6, 7, 9]
    codes = [line.error.problem_code for line in lines[1:7]]
    assert codes == [
        "malformed-json", "invalid-input", "invalid-utf8", *["malformed-json"] * 3
    ]  # fmt: skip
    assert "column 1" in lines[1].error.detail


def test_a_line_of_a_hostile_file_is_a_bad_line(tmp_path):
    path = tmp_path / "in.jsonl"
    lines = [
        b'{"a": 1, "a": 2}',
        b'{"a": ' * 65 + b"1" + b"}" * 65,
        b'{"a": "%s"}' % (b"x" * 2**22),
    ]
    path.write_bytes(b"\n".join([*lines, json.dumps(ROWS[0]).encode()]))
    *bad, good = read_lines(str(path))
    assert [line.error.problem_code for line in bad] == [
        "invalid-input", "malformed-json", "payload-too-large"
    ]  # fmt: skip
    assert good.row == ROWS[0]


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("a.jsonl", ".jsonl"),
        ("../A.JSONL.GZ", ".jsonl.gz"),
        (".ndjson", ".ndjson"),
        ("a.parquet", ".parquet"),
        ("a.jsonl.zip", None),
        ("a.gz", None),
        ("jsonl", None),
        ("", None),
    ],
)
def test_the_ending_tells_the_format(name, ending):
    assert ending_of(name) == ending


def test_a_truncated_gzip_file_gives_its_good_lines_first(tmp_path):
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 50_000)[:-40])
    *good, last = read_lines(str(path))
    assert good
    assert all(line.row for line in good)
    assert "broken here" in last.error.detail


@pytest.mark.parametrize("name", ["nowhere.jsonl", "no where", "folder/"])
def test_a_source_that_is_not_there(tmp_path, name):
    with pytest.raises(NotFound, match="there is no file"):
        read_lines(str(tmp_path / name))


def test_a_hub_name_that_cannot_be_loaded_is_one_sentence(monkeypatch):
    import datasets

    def offline(*args, **kwargs):
        raise ConnectionError("no route\nmany more lines")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(NotFound, match=r"'someone/something'.*no route") as caught:
        read_lines("someone/something")
    assert "\n" not in caught.value.detail


def test_unknown_endings_and_broken_parquet(tmp_path):
    (tmp_path / "in.txt").write_text("x")
    (tmp_path / "in.parquet").write_text("x")
    with pytest.raises(InvalidInput, match="unknown ending"):
        read_lines(str(tmp_path / "in.txt"))
    with pytest.raises(InvalidInput, match="no readable Parquet"):
        read_lines(str(tmp_path / "in.parquet"))


def test_reading_something_else_as_records(tmp_path):
    with pytest.raises(InvalidInput, match=r"line 1 of .* is no record"):
        list(read_records(write(tmp_path / "in.jsonl")))
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(InvalidInput, match="line 1: not JSON"):
        list(read_records(str(tmp_path / "bad.jsonl")))
