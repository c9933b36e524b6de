"""Token files: what was put in comes out, or nothing does."""

from __future__ import annotations

import os
import threading
import tracemalloc

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asap.errors import NotFound
from asap.sft import IGNORED, SftExample
from asap_trainer.token_cache import ROWS, Examples, TokenCache, TokenRow, key_of, sha256_of

KEY = key_of(["data", 1])


def row_of(id: str, ids: list[int], masked: int, text: str | None = None) -> TokenRow:
    labels = (IGNORED,) * masked + tuple(ids[masked:])
    return TokenRow(id, len(ids), SftExample(id, tuple(ids), labels), None, text)


@st.composite
def row_lists(draw):
    rows = []
    for number in range(draw(st.integers(0, 2 * ROWS + 3))):
        id = f"{number}-{draw(st.text(max_size=3))}"
        if draw(st.booleans()):
            rows.append(TokenRow(id, draw(st.integers(0, 10**6)), None, "too-long"))
        else:
            ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4))
            text = draw(st.none() | st.text(max_size=3))
            rows.append(row_of(id, ids, draw(st.integers(0, len(ids) - 1)), text))
    return rows


@given(row_lists())
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
def test_rows_come_back_as_they_were(tmp_path_factory, rows):
    cache = TokenCache(tmp_path_factory.mktemp("cache"))
    cache.put(KEY, rows)
    file = cache.get(KEY)
    assert len(file) == len(rows)
    back = [
        TokenRow(
            file.ids[i],
            int(file.tokens[i]),
            None if file.reasons[i] else file.example(i),
            file.reasons[i],
            file.text(i),
        )
        for i in range(len(file))
    ]
    assert back == rows
    loss = [sum(x != IGNORED for x in row.example.labels) if row.example else 0 for row in rows]
    assert file.loss_tokens.tolist() == loss


@pytest.fixture
def cache(tmp_path):
    return TokenCache(tmp_path)


@pytest.fixture
def path(cache, tmp_path):
    """A file of two samples."""
    cache.put(KEY, [row_of("a", [1, 2, 3], 1, "text"), row_of("b", [4, 5], 1)])
    [path] = tmp_path.iterdir()
    return path


def test_any_damaged_byte_is_found(cache, path):
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert cache.get(KEY) is None
    path.write_bytes(whole)
    assert cache.get(KEY).example(0) == SftExample("a", (1, 2, 3), (IGNORED, 2, 3))


@pytest.mark.parametrize("size", [0, 1, 32, 33, -32, -1])
def test_a_file_that_is_cut_off_is_not_believed(cache, path, size):
    path.write_bytes(path.read_bytes()[:size])
    assert cache.get(KEY) is None


def test_a_file_of_another_key_is_not_believed(cache, path):
    other = key_of(["data", 2])
    path.rename(path.with_name(path.name.replace(KEY, other)))
    assert other != KEY
    assert cache.get(other) is None


def test_what_is_not_there_is_not_found(cache, tmp_path):
    assert cache.get(KEY) is None
    with pytest.raises(NotFound):
        sha256_of(tmp_path / "none")


def test_rows_that_fail_leave_no_file(cache, tmp_path):
    def rows():
        yield from (row_of(str(n), [1, 2], 1) for n in range(3 * ROWS))
        raise RuntimeError("a bad line")

    with pytest.raises(RuntimeError, match="a bad line"):
        cache.put(KEY, rows())
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_goes_and_what_another_writes_stays(cache, tmp_path):
    old, new = tmp_path / f".{KEY}-old.part", tmp_path / f".{KEY}-new.part"
    old.touch()
    new.touch()
    os.utime(old, (0, 0))
    cache.put(KEY, [row_of("a", [1], 0)])
    assert not old.exists()
    assert new.exists()


def test_two_writers_of_one_key_both_read_it(cache):
    rows = [row_of(str(n), [n, 1], 1) for n in range(3 * ROWS)]
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(cache.put(KEY, iter(rows)))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [file.example(100) for file in found] == [rows[100].example] * 4


def test_memory_holds_no_tokens_until_they_are_read(cache):
    samples, tokens = 10 * ROWS, 2000
    ids, before = list(range(tokens)), pa.total_allocated_bytes()
    tracemalloc.start()
    file = cache.put(KEY, (row_of(str(n), ids, 5) for n in range(samples)))
    _, while_written = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    start, _ = tracemalloc.get_traced_memory()
    file = cache.get(KEY)
    assert int(file.tokens.sum()) == samples * tokens
    assert file.example(samples - 1).input_ids == tuple(ids)
    _, while_read = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = samples * tokens * 4  # bytes of the file
    assert while_written < size
    assert while_read - start < size / 10
    assert pa.total_allocated_bytes() - before < size / 10


def test_a_key_follows_from_every_fact():
    keys = {key_of(facts) for facts in (["a"], ["b"], ["a", None], [["a"]], {"a": 1}, {"a": "1"})}
    assert len(keys) == 6
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})


def test_examples_are_a_lazy_sequence_over_files(cache):
    rows = [row_of(str(n), [n, 7], 1, f"text {n}") for n in range(ROWS + 2)]
    file = cache.put(KEY, rows)
    examples = Examples([(file, n) for n in (ROWS + 1, 0, 3)])
    assert list(examples) == [rows[n].example for n in (ROWS + 1, 0, 3)]
    assert examples.ids == [str(ROWS + 1), "0", "3"]
    assert (examples.tokens.tolist(), examples.loss_tokens.tolist()) == ([2] * 3, [1] * 3)
    assert list(examples[1:]) == list(examples)[1:]
    assert examples[-1] == rows[3].example
    assert examples.text(0) == f"text {ROWS + 1}"
