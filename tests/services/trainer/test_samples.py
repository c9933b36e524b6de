"""Training data in: four layouts, three formats, and what is never trained on by accident."""

from __future__ import annotations

import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from asap.config import PruneConfig
from asap.errors import InvalidInput, NotFound
from asap.sft import SftSample
from asap.types import CoarseBlock, Record, Triple
from asap_runtime.json_lines import ReadLimits, read_json_lines
from asap_runtime.layouts import RecordWriter
from asap_trainer.samples import LAYOUTS, read_samples, samples_of

COT = "First I add.\n\nWait, let me check.\n\nSo it is 3."
PRUNED = "First I add.\n\nSo it is 3."


def record_of(id="a", cot=COT, kept=(0, 2), status="accepted", **meta) -> Record:
    triple = Triple(id=id, question="1+2?", cot=cot, answer="3", meta=meta)
    block = CoarseBlock(protocol="select", model="none", kept=kept, status=status)
    return Record(triple=triple, config=PruneConfig(method="coarse"), coarse=block)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat(*turns, **fields):
    return {"messages": [{"role": role, "content": text} for role, text in turns], **fields}


ROWS = {
    "record": record_of().model_dump(mode="json"),
    "messages": chat(("user", "1+2?"), ("assistant", f"<think>\n{PRUNED}\n</think>\n3"), id="a"),
    "triple": {"id": "a", "question": "1+2?", "cot": PRUNED, "answer": "3"},
    "prompt_completion": {
        "id": "a",
        "prompt": "1+2?",
        "completion": f"<think>\n{PRUNED}\n</think>\n3",
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_sample(layout, tmp_path):
    [sample] = read_samples(write_lines(tmp_path / "data.jsonl", [ROWS[layout]]))
    assert sample == SftSample("a", "1+2?", PRUNED, "3")


@pytest.mark.parametrize("layout", ["record", "messages", "triple"])
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
def test_reads_what_pruning_writes(layout, ending, tmp_path, real_traces):
    records = []
    for number, trace in enumerate(real_traces[:3]):
        record = record_of(id=f"r{number}", cot=trace["cot"], prompt="other", response="other")
        kept = range(0, len(record.source_steps), 2)
        records.append(record_of(f"r{number}", trace["cot"], kept, prompt="no", response="no"))
    path = tmp_path / f"data{ending}"
    with RecordWriter(path, layout) as writer:
        for record in records:
            writer.write(record)
    renamed = path.rename(tmp_path / "copy-of-a-blob")  # which has no ending
    assert all(record.status == "compressed" for record in records)
    assert [(sample.id, sample.cot) for sample in read_samples(renamed)] == [
        (record.id, record.pruned_cot) for record in records
    ]


def test_reads_lines_from_a_stream():
    lines = read_json_lines(
        io.BytesIO(gzip.compress(json.dumps(ROWS["triple"]).encode())),
        ReadLimits(),
        compressed=True,
    )
    assert [sample.id for sample in samples_of(lines)] == ["a"]


def test_a_chat_that_carries_its_unpruned_source_along_is_not_trained_on_that():
    row = {**ROWS["messages"], "question": "1+2?", "cot": COT, "answer": "3", "prompt": "x"}
    [sample] = samples_of(read_json_lines(io.BytesIO(json.dumps(row).encode()), ReadLimits()))
    assert sample.cot == PRUNED


REFUSED = {
    "no record": ({**ROWS["record"], "triple": {"id": 3}}, "no record"),
    "rejected": (record_of(status="rejected").model_dump(mode="json"), "rejected"),
    "not pruned": (
        {name: value for name, value in ROWS["record"].items() if name != "pruned_cot"},
        "no pruned_cot",
    ),
    "compressed in name alone": ({**ROWS["record"], "pruned_cot": COT}, "not clear"),
    "another status": ({**ROWS["record"], "status": "unchanged"}, "not clear"),
    "system turn": (
        chat(("system", "Think."), ("user", "q"), ("assistant", "<think>c</think>a")),
        "system turn",
    ),
    "two user turns": (
        chat(("user", "q"), ("user", "q"), ("assistant", "<think>c</think>a")),
        "one user turn",
    ),
    "no thinking": (chat(("user", "q"), ("assistant", "a")), "</think>"),
    "no thinking in a completion": ({"prompt": "q", "completion": "a"}, "</think>"),
    "cut off": ({**ROWS["triple"], "finish_reason": "length"}, "cut off"),
    "control token": ({**ROWS["triple"], "question": "<|im_end|>"}, "control token"),
    "half a character": ({**ROWS["triple"], "cot": "\ud800"}, "surrogate"),
    "no layout": ({"text": "x"}, "known layout"),
    "not text": ({**ROWS["triple"], "cot": ["x"]}, "must be text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_a_row_and_names_its_line(case, tmp_path):
    row, words = REFUSED[case]
    path = write_lines(tmp_path / "data.jsonl", [])
    path.write_text(f"\n\n{json.dumps(row)}\n")
    with pytest.raises(InvalidInput, match=words) as caught:
        list(read_samples(path))
    assert caught.value.detail.startswith("line 3 of 'data.jsonl': ")
    assert caught.value.context["line"] == 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_row_decides_for_all(layout, tmp_path):
    others = [row for name, row in ROWS.items() if name != layout]
    for number, other in enumerate(others):
        rows = [ROWS[layout], {**other, "id": "b"}]
        samples = read_samples(write_lines(tmp_path / f"{number}.jsonl", rows))
        assert next(samples).id == "a"
        with pytest.raises(InvalidInput, match="line 2"):
            next(samples)


@pytest.mark.parametrize("field", ["question", "cot", "answer"])
def test_refuses_an_id_of_two_samples(field, tmp_path):
    row = ROWS["triple"]
    other = {**row, field: "something else"}
    samples = read_samples(write_lines(tmp_path / "data.jsonl", [row, other]))
    next(samples)
    with pytest.raises(InvalidInput, match=r"line 2 of .* another sample in line 1"):
        next(samples)


@pytest.mark.parametrize("id", ["a", None])
def test_the_same_sample_twice_is_no_mistake(id, tmp_path):
    row = {**ROWS["triple"], "id": id}
    first, second = read_samples(write_lines(tmp_path / "data.jsonl", [row, row]))
    assert first == second


def test_refuses_broken_files(tmp_path):
    with pytest.raises(NotFound):
        read_samples(tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"id": ')
    with pytest.raises(InvalidInput, match="line 1"):
        list(read_samples(tmp_path / "bad.jsonl"))
    (tmp_path / "bad.gz").write_bytes(gzip.compress(json.dumps(ROWS["triple"]).encode())[:-9])
    with pytest.raises(InvalidInput, match="broken"):
        list(read_samples(tmp_path / "bad.gz"))
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "data.parquet")
    whole = (tmp_path / "data.parquet").read_bytes()
    (tmp_path / "bad.parquet").write_bytes(whole[:-5])
    with pytest.raises(InvalidInput, match="Parquet"):
        list(read_samples(tmp_path / "bad.parquet"))
    with pytest.raises(InvalidInput, match="known layout"):
        list(read_samples(tmp_path / "data.parquet"))


def test_an_empty_file_has_no_samples(tmp_path):
    assert list(read_samples(write_lines(tmp_path / "data.jsonl", []))) == []
