from __future__ import annotations

import gzip
import io
import tracemalloc

import pytest

from asap_runtime.json_lines import ReadLimits, read_json_lines

MIB = 2**20
STRANGERS = ReadLimits(expanded_ratio=20, expanded_bytes=100 * MIB)


def read(data, limits=STRANGERS, **options):
    return list(read_json_lines(io.BytesIO(data), limits, **options))


def test_lines_are_counted_and_blank_ones_passed_over():
    lines = read(b'\n{"a": 1}\r\n  \n{"a": 2}')
    assert [(line.number, line.row) for line in lines] == [(2, {"a": 1}), (4, {"a": 2})]


def test_reading_goes_on_after_a_line_without_a_look_at_those_before():
    data = b'{"a": 1}\n{broken\n\n{"a": 4}\n{broken\n'
    assert [(line.number, line.error is None) for line in read(data, after=2)] == [
        (4, True),
        (5, False),
    ]
    assert read(data, after=9) == []
    assert [line.number for line in read(gzip.compress(data), compressed=True, after=3)] == [4, 5]


@pytest.mark.parametrize("compressed", [False, True])
def test_a_line_has_a_longest_length(compressed):
    fits, long = b'{"a": "%s"}' % (b"x" * 91), b'{"a": "%s"}' % (b"x" * 92)
    data = b"\n".join([fits, long, b"y" * 5000, fits, fits + b"\r", long])
    data = gzip.compress(data) if compressed else data
    lines = read(data, ReadLimits(line_bytes=100), compressed=compressed)
    assert [line.error.problem_code if line.error else None for line in lines] == [
        None, "payload-too-large", "payload-too-large", None, "payload-too-large",
        "payload-too-large",
    ]  # fmt: skip
    assert not any(line.fatal for line in lines)


class Endless(io.RawIOBase):
    """Zeros without a line's end, as many as a test lets through."""

    def __init__(self, size):
        self.left = size

    def readable(self):
        return True

    def readinto(self, buffer):
        size = min(self.left, len(buffer))
        buffer[:size] = bytes(size)
        self.left -= size
        return size


def test_a_line_without_an_end_is_not_read_whole():
    stream = io.BufferedReader(Endless(200 * MIB))
    tracemalloc.start()
    [line] = read_json_lines(stream, ReadLimits(line_bytes=MIB))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert line.error.problem_code == "payload-too-large"
    assert peak < 8 * MIB


def test_a_compressed_file_expands_no_further_than_its_limits():
    bomb = gzip.compress(b'{"a": 1}\n' + b" " * 90 * MIB)
    first, last = read(bomb, compressed=True)
    assert first.row == {"a": 1}
    assert last.fatal
    assert last.error.problem_code == "decompression-limit"
    limits = ReadLimits(expanded_bytes=50 * MIB)
    assert [line.fatal for line in read(bomb, limits, compressed=True)] == [False, True]
    assert not any(line.fatal for line in read(bomb, ReadLimits(), compressed=True))


def test_text_that_repeats_itself_is_no_bomb():
    honest = gzip.compress(b'{"a": "the same line again and again"}\n' * 1_000_000)
    assert len(honest) * 20 < 39 * 1_000_000 < 64 * MIB
    lines = read_json_lines(io.BytesIO(honest), STRANGERS, compressed=True)
    assert sum(line.error is None for line in lines) == 1_000_000


@pytest.mark.parametrize("cut", [1, 8, 40])
def test_a_truncated_file_gives_its_good_lines_first(cut):
    data = gzip.compress(b'{"a": 1}\n' * 50_000)[:-cut]
    *good, last = read(data, compressed=True)
    assert good
    assert all(line.row for line in good)
    assert last.fatal
    assert "broken here" in last.error.detail


def test_a_file_that_is_damaged_inside_ends_there():
    data = bytearray(gzip.compress(bytes(range(256)) * 1000))
    data[100:140] = bytes(40)
    assert read(bytes(data), compressed=True)[-1].fatal


def test_files_that_follow_each_other_in_one_are_read():
    data = gzip.compress(b'{"a": 1}\n') + gzip.compress(b'{"a": 2}\n')
    assert [line.row["a"] for line in read(data, compressed=True)] == [1, 2]


def test_the_stream_is_closed_whoever_stops():
    stream = io.BytesIO(b"{}\n{}\n")
    lines = read_json_lines(stream, STRANGERS)
    next(lines)
    lines.close()
    assert stream.closed
