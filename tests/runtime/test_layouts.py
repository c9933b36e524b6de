from __future__ import annotations

import io
import random

import pyarrow.parquet as pq
import pytest

from asap.config import PruneConfig
from asap.errors import InvalidInput, NotFound
from asap.fine import fine_prune
from asap.types import Record, Triple
from asap_runtime.datasets import read_lines, read_records
from asap_runtime.layouts import RecordWriter, in_chunks, to_row
from fakes import TableScorer


async def records(count=3):
    triples = [
        Triple(id=str(i), question="q", cot="one step\n\nanother", answer="ä", meta={"i": i})
        for i in range(count)
    ]
    config = PruneConfig(method="asap_stage2", max_tokens=2)
    scorer = TableScorer(lambda steps: [0.25, None])
    return await fine_prune([Record(triple=t, config=config) for t in triples], scorer)


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.parquet"])
async def test_records_survive_a_round_trip(tmp_path, name):
    done = await records(300)
    with RecordWriter(tmp_path / name, "record") as writer:
        for record in done:
            writer.write(record)
    assert list(read_records(str(tmp_path / name))) == done
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.parquet"])
async def test_equal_records_give_equal_bytes(tmp_path, name):
    done = await records()
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        with RecordWriter(tmp_path / folder / name, "messages") as writer:
            for record in done:
                writer.write(record)
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


async def test_layouts():
    [record] = await records(1)
    assert to_row(record, "triple") == {
        "id": "0", "i": 0, "question": "q", "cot": "another", "answer": "ä"
    }  # fmt: skip
    assert to_row(record, "messages")["messages"] == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>\nanother\n</think>\nä"},
    ]
    assert to_row(record, "record")["pruned_cot"] == "another"


@pytest.mark.parametrize("layout", ["messages", "triple", "record"])
async def test_parquet_of_no_record_and_of_uneven_meta(tmp_path, layout):
    done = await records(2)
    odd = done[0].triple.model_copy(update={"meta": {"i": 1, "tags": ["x"]}})
    with RecordWriter(tmp_path / "out.parquet", layout) as writer:
        writer.write(done[0].model_copy(update={"triple": odd}))
        writer.write(done[1])
    assert len(list(read_lines(str(tmp_path / "out.parquet")))) == 2
    with RecordWriter(tmp_path / "none.parquet", layout):
        pass
    assert list(read_lines(str(tmp_path / "none.parquet"))) == []


def test_a_failed_run_leaves_the_old_file(tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("old")
    with pytest.raises(RuntimeError), RecordWriter(out, "record"):
        raise RuntimeError
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_output_names_that_cannot_work(tmp_path):
    for name, error in (("x.csv", InvalidInput), ("no/x.jsonl", NotFound)):
        with pytest.raises(error):
            RecordWriter.check(tmp_path / name)
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(InvalidInput, match="is a folder"):
        RecordWriter.check(tmp_path / "d.jsonl")


@pytest.mark.parametrize("layout", ["messages", "triple", "record"])
@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
async def test_chunks_are_the_file_in_pieces(tmp_path, name, layout):
    done = await records(700)
    with RecordWriter(tmp_path / name, layout) as writer:
        for record in done:
            writer.write(record)
    chunks = list(in_chunks(done, layout, name.partition(".")[2]))
    assert b"".join(chunks) == (tmp_path / name).read_bytes()
    assert list(in_chunks([], layout, "jsonl")) == []
    empty = b"".join(in_chunks([], layout, "parquet"))
    assert pq.read_table(io.BytesIO(empty)).num_rows == 0


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
async def test_chunks_come_while_records_do_and_are_not_kept(format):
    [record] = await records(1)
    rng, given = random.Random(0), 0

    def endless():
        nonlocal given
        while True:
            given += 1
            cot = f"one step\n\n{rng.randbytes(10_000).hex()}"
            triple = record.triple.model_copy(update={"cot": cot})
            yield record.model_copy(update={"triple": triple})

    chunks = in_chunks(endless(), "record", format)
    sizes = [len(next(chunks)) for _ in range(5)]
    assert given < 5 * 256 + 1
    assert max(sizes) < 2**26
