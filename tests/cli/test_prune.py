from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest

from asap.types import Record
from asap_cli.journal import Journal
from fakes import rows
from openai_server import OpenAIServer, Reply, Status
from waiting import PATIENCE_S

DIRECT = "Step-by-Step Solution: first this, then that."
LATER = "This one is answered in an hour."
SOON = 48
"""Records of `many` that are answered at once: three chunks of those that are scored together."""


@pytest.fixture
def no_llm(tiny_model_dir):
    """Options of a run without an LLM, on the tiny model."""
    return ("--anchor", "extractive", "--scorer", tiny_model_dir, "--device", "cpu", "--yes")


def answer(prompt, body):
    """An LLM that keeps the first half of the steps."""
    if "numbered steps" in prompt:
        steps = [int(line[1 : line.index("]")]) for line in prompt.split("\n") if line[:1] == "["
                 and line[1:2].isdigit() and "]" in line]  # fmt: skip
        return Reply(json.dumps({"keep": list(range(1, max(steps) // 2 + 2))}))
    return Reply(DIRECT)


@pytest.fixture
def llm(tmp_path, tiny_model_dir):
    """A scripted LLM server and the options that name it."""
    with OpenAIServer(answer) as server:
        yield server, (
            "--llm-base-url", server.base_url, "--llm-model", "scripted", "--protocol", "select",
            "--scorer", tiny_model_dir, "--device", "cpu", "--yes",
            "--cache-dir", tmp_path / "cache", "--llm-price", "1,2",
        )  # fmt: skip


def test_prunes_into_records_with_every_decision(asap, samples, no_llm, tmp_path):
    out = tmp_path / "out.jsonl"
    ran = asap("prune", samples, "-o", out, *no_llm, "--max-tokens", 200)
    assert ran.code == 0, ran.err
    source = rows(samples)
    records = [Record.model_validate(row) for row in rows(out)]
    assert [r.id for r in records] == [row["id"] for row in source]
    for record, row in zip(records, source, strict=True):
        assert (record.triple.question, record.triple.answer) == (row["question"], row["answer"])
        assert record.tokens.pruned <= 200 or "over_budget" in record.flags
        kept = [record.source_steps[i] for i in record.kept_steps]
        assert record.pruned_cot == "\n\n".join(kept)
        assert record.triple.meta["license"] == row["license"]
    for word in ("kept ratio", "steps", "seconds", "records", "extractive (not from the paper)"):
        assert word in ran.err
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.parquet"])
def test_a_second_run_gives_the_same_bytes(asap, samples, no_llm, tmp_path, name):
    outputs = []
    for _ in range(2):
        assert asap("prune", samples, "-o", tmp_path / name, *no_llm).code == 0
        outputs.append((tmp_path / name).read_bytes())
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("ending", ["jsonl.gz", "parquet"])
def test_other_inputs_and_layouts(asap, samples, no_llm, tmp_path, ending):
    source = tmp_path / f"again.{ending}"
    if ending == "jsonl.gz":
        source.write_bytes(gzip.compress(samples.read_bytes()))
    else:
        assert asap("prune", samples, "-o", source, *no_llm, "--method", "original").code == 0
    out = tmp_path / "chat.jsonl"
    assert asap("prune", source, "-o", out, *no_llm, "--layout", "messages").code == 0
    turns = rows(out)[0]["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"]
    assert turns[1]["content"].startswith("<think>\n")
    out = tmp_path / "triples.parquet"
    assert asap("prune", source, "-o", out, *no_llm, "--layout", "triple").code == 0
    assert pq.read_table(out).column_names == ["id", "question", "cot", "answer", "meta"]


def test_with_an_llm_the_second_run_calls_nobody(asap, samples, llm, tmp_path):
    server, options = llm
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    ran = asap("prune", samples, "-o", first, *options, "--max-tokens", 300)
    assert ran.code == 0, ran.err
    assert "12 calls sent now, 0 from the cache" in ran.err
    assert "cost $" in ran.err
    assert len(server.requests) == 12
    ran = asap("prune", samples, "-o", second, *options, "--max-tokens", 300)
    assert "0 calls sent now, 12 from the cache" in ran.err
    assert len(server.requests) == 12
    assert first.read_bytes() == second.read_bytes()
    assert all(row["coarse"]["protocol"] == "select" for row in rows(first))


def test_bad_lines_are_listed_and_every_good_record_is_written(asap, samples, no_llm, tmp_path):
    good = samples.read_text().splitlines()
    triple = json.loads(good[0])
    bad = {
        2: ("{not json", "not JSON at column 2"),
        4: (json.dumps({k: v for k, v in triple.items() if k != "answer"}), "'answer'"),
        5: (json.dumps({**triple, "cot": "a </think> b </think>"}), "control token '</think>'"),
        6: (json.dumps({**triple, "question": "<｜User｜>"}), "control token '<｜User｜>'"),
        7: ("[1, 2]", "expected a JSON object, found list"),
    }
    lines = [good[0], bad[2][0], good[1], bad[4][0], bad[5][0], bad[6][0], bad[7][0], *good[2:]]
    lines.append(json.dumps({**triple, "id": "empty", "cot": " "}))
    samples.write_text("\n".join(lines) + "\n")
    out = tmp_path / "out.jsonl"
    ran = asap("prune", samples, "-o", out, *no_llm)
    assert ran.code == 65
    assert len(rows(out)) == 7
    ledger = {entry["line"]: entry for entry in rows(tmp_path / "out.jsonl.rejected.jsonl")}
    assert set(ledger) == set(bad)
    for line, (_, words) in bad.items():
        assert words in ledger[line]["detail"]
        assert f"line {line}: " in ran.err
    assert rows(out)[-1]["flags"] == ["empty_cot"]
    assert "empty_cot 1" in ran.err


def test_two_think_tags_in_a_generation_are_one_clear_sentence(asap, no_llm, tmp_path):
    source = tmp_path / "in.jsonl"
    generation = "<think>\na\n\nb</think>answer"
    lines = [{"prompt": "q", "generation": text} for text in (generation, generation + "</think>")]
    source.write_text("\n".join(map(json.dumps, lines)))
    ran = asap("prune", source, "-o", tmp_path / "out.jsonl", *no_llm)
    assert ran.code == 65
    assert "line 2: expected one <think> … </think>" in ran.err
    assert len(rows(tmp_path / "out.jsonl")) == 1


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("nowhere.jsonl", "-o", "out.jsonl"), 66, "there is no file 'nowhere.jsonl'"),
        (("in.jsonl", "-o", "out.csv"), 65, "must end in"),
        (("in.jsonl", "-o", "no/out.jsonl"), 66, "'no'"),
        (
            ("in.jsonl", "-o", "o.jsonl", "--max-tokens", 0),
            65,
            "max_tokens: Input should be greater",
        ),
        (("in.jsonl", "-o", "o.jsonl", "--max-tokens", 9, "--keep-ratio", 0.5), 65, "exactly one"),
        (("in.jsonl", "-o", "o.jsonl", "--set", "taw=1"), 65, "NAME=VALUE"),
        (("in.jsonl", "-o", "o.jsonl", "--set", "tau=9"), 65, "tau: "),
        (("in.jsonl", "-o", "o.jsonl", "--set", "method=asapp"), 65, "did you mean 'asap'"),
        (("in.jsonl", "-o", "o.jsonl", "--anchor", "llm"), 78, "--llm-model"),
        (("in.jsonl", "-o", "o.jsonl", "--llm-price", "one"), 65, "--llm-price"),
        (("in.jsonl", "-o", "o.jsonl", "--scorer", "./nowhere"), 78, "nowhere"),
        (("in.jsonl", "-o", "o.jsonl", "--scorer", "empty_folder"), 78, "holds no"),
        (("empty.jsonl", "-o", "o.jsonl"), 65, "holds no line"),
        (("odd.jsonl", "-o", "o.jsonl"), 65, "no known schema"),
    ],
)
def test_what_cannot_work_is_one_sentence_with_its_exit_code(
    asap, samples, monkeypatch, args, code, words
):
    monkeypatch.chdir(samples.parent)
    (samples.parent / "empty_folder").mkdir()
    (samples.parent / "empty.jsonl").write_text("")
    (samples.parent / "odd.jsonl").write_text('{"text": "x"}\n')
    ran = asap("prune", *args)
    assert ran.code == code
    last = ran.err.strip().splitlines()[-1]
    assert last.startswith("asap: ")
    assert words in last
    assert "Traceback" not in ran.err


def test_a_server_that_is_gone_stops_the_run_and_keeps_what_is_done(asap, samples, llm, tmp_path):
    server, options = llm
    out = tmp_path / "out.jsonl"
    count = {"prompts": 0}

    def failing(prompt, body):
        count["prompts"] += 1
        return Status(401) if count["prompts"] > 40 else answer(prompt, body)

    many = [
        json.dumps({**row, "id": f"{row['id']}-{i}", "question": f"{i} {row['question']}"})
        for i in range(6)
        for row in rows(samples)
    ]
    samples.write_text("\n".join(many) + "\n")
    with OpenAIServer(failing) as broken:
        args = [str(a).replace(server.base_url, broken.base_url) for a in options]
        ran = asap("prune", samples, "-o", out, *args, "--llm-concurrency", 1)
    assert ran.code == 69
    assert "401" in ran.err
    done = len(rows(out))
    assert 0 < done < 36
    ran = asap("prune", samples, "-o", out, *options)
    assert ran.code == 0
    assert f"resuming: {done} records" in ran.err
    assert [row["id"] for row in rows(out)] == [json.loads(line)["id"] for line in many]


@pytest.fixture
def many(samples):
    """96 records; a run of them stands still behind the first SOON, until LATER is answered."""
    source = [
        {**row, "id": f"{row['id']}-{i}", "question": f"{i} {row['question']}"}
        for i in range(16)
        for row in rows(samples)
    ]
    for row in source[SOON:]:
        row["question"] = f"{LATER} {row['question']}"
    samples.write_text("".join(f"{json.dumps(row)}\n" for row in source))
    return samples


def until_it_stands_still(running, journal):
    deadline = time.monotonic() + 2 * PATIENCE_S
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= SOON):
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.05)


def silent_at_first(prompt, body):
    return Reply(DIRECT, delay_s=3600) if LATER in prompt else answer(prompt, body)


def test_a_killed_run_goes_on_without_repeating_a_call(many, llm, tmp_path):
    server, options = llm
    server.script = silent_at_first
    out, reference = tmp_path / "out.jsonl", tmp_path / "reference.jsonl"
    command = [sys.executable, "-m", "asap_cli.main", "prune", str(many), "-o"]
    options = [*map(str, options), "--llm-concurrency", "4"]
    journal = Journal.path_for(out)
    started = subprocess.Popen([*command, str(out), *options], stderr=subprocess.DEVNULL)
    until_it_stands_still(started, journal)
    started.send_signal(signal.SIGKILL)
    started.wait()
    server.script = answer
    with journal.open("ab") as stream:
        stream.write(b'{"key": "cut in the mid')  # the line that the kill cut
    ran = subprocess.run(
        [*command, str(out), *options], stderr=subprocess.PIPE, text=True, check=True
    )
    assert f"resuming: {SOON} records" in ran.stderr
    prompts = [(r.prompt, r.body["seed"]) for r in server.requests]
    # replies of calls in flight at the kill were never seen; at most those are asked for again
    assert len(prompts) - len(set(prompts)) <= 4
    subprocess.run([*command, str(reference), *options], check=True, stderr=subprocess.DEVNULL)
    ours, expected = rows(out), rows(reference)
    assert [r["id"] for r in ours] == [r["id"] for r in expected]
    assert [r["kept_steps"] for r in ours] == [r["kept_steps"] for r in expected]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_a_valid_file(many, llm, tmp_path, number):
    server, options = llm
    server.script = silent_at_first
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "asap_cli.main", "prune", str(many), "-o", str(out)]
    running = subprocess.Popen([*command, *map(str, options)], stderr=subprocess.PIPE, text=True)
    until_it_stands_still(running, Journal.path_for(out))
    os.kill(running.pid, number)
    _, err = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 130, err
    written = [Record.model_validate(row) for row in rows(out)]
    assert len(written) == SOON
    assert f"interrupted: {SOON} records" in err
    assert "Traceback" not in err


def test_dry_run_estimates_and_writes_nothing(asap, samples, llm, tmp_path):
    server, options = llm
    ran = asap("prune", samples, "-o", tmp_path / "out.jsonl", *options, "--dry-run")
    assert ran.code == 0
    for words in ("about 12 calls", "about $", "tokens/s, measured now", "6 (0 lines"):
        assert words in ran.err
    assert server.requests == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl"]


def test_detection_shows_three_samples(asap, samples, no_llm, tmp_path):
    ran = asap("prune", samples, "-o", tmp_path / "out.jsonl", *no_llm)
    assert "schema triple (question, cot, answer)" in ran.err
    first = rows(samples)[0]
    assert " ".join(first["question"].split())[:30] in ran.err


def test_the_key_is_never_shown(asap, samples, llm, tmp_path, monkeypatch):
    server, options = llm
    monkeypatch.setenv("ASAP_LLM__API_KEY", "sk-planted-secret")
    ran = asap("prune", samples, "-o", tmp_path / "out.jsonl", *options)
    assert server.requests[0].headers["Authorization"] == "Bearer sk-planted-secret"
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert b"planted" not in written
    assert "planted" not in ran.out + ran.err
