from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from asap.types import Record
from asap_cli.client import JobsClient
from asap_cli.watch import JobProgress
from asap_runtime.datasets import read_records
from asap_runtime.logs import configure_logs
from asap_runtime.settings import TelemetrySettings
from fakes import rows
from live_server import live_server
from waiting import PATIENCE_S, until

EXAMPLES = Path(__file__).parents[2] / "examples" / "triples.jsonl"


@pytest.fixture(autouse=True)
def quiet():
    """The servers of this module outlive a test, and what they log with does not."""
    configure_logs(TelemetrySettings(log_level="error"))


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    with live_server(tmp_path_factory.mktemp("live") / "home") as server:
        yield server


@pytest.fixture
def server(live, monkeypatch):
    """The server, as the environment names it."""
    monkeypatch.setenv("ASAP_SERVER", live.url)
    yield live
    live.anchor.refuses.clear()
    live.anchor.open.set()


@pytest.fixture
def held(server, asap, samples):
    """A job whose items wait in stage 1."""
    server.anchor.open.clear()
    ran = asap("jobs", "submit", samples)
    assert ran.code == 0, ran.err
    with JobsClient.open(server.url) as client:
        asyncio.run(until(lambda: client.job(ran.out.strip()).phase != "validating"))
    return ran.out.strip()


def test_a_file_is_submitted_followed_and_downloaded(asap, server, tmp_path):
    ran = asap("jobs", "submit", EXAMPLES, "--max-tokens", 300, "--set", "refill=true", "--watch")
    assert ran.code == 0, ran.err
    job = ran.out.strip()
    assert "triples.jsonl submitted to http://" in ran.err
    assert "anchor 48/48, surprisal 48/48" in ran.err
    assert f"job {job} is done" in ran.err
    assert "48 succeeded" in ran.err

    out = tmp_path / "out.jsonl"
    ran = asap("jobs", "download", job, "-o", out)
    assert (ran.code, ran.out) == (0, "")
    assert "48 records written" in ran.err
    records = [Record.model_validate(row) for row in rows(out)]
    assert [r.id for r in records] == [row["id"] for row in rows(EXAMPLES)]
    assert {(r.config.max_tokens, r.config.refill) for r in records} == {(300, True)}
    assert {r.config.anchor for r in records} == {"extractive"}, "left to the server"

    chat = tmp_path / "chat.jsonl"
    assert asap("jobs", "download", job, "-o", chat, "--layout", "messages").code == 0
    assert [turn["role"] for turn in rows(chat)[0]["messages"]] == ["user", "assistant"]

    table = tmp_path / "out.parquet"
    ran = asap("jobs", "download", job, "-o", table)
    assert "48 records written" in ran.err
    assert list(read_records(str(table))) == records
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["chat.jsonl", "out.jsonl", "out.parquet"]


def test_bad_lines_are_counted_by_code_with_an_example(asap, server, samples):
    good = samples.read_text().splitlines() * 6
    lines = [*good[:2], "{nope", *good[2:], "[[[", '{"question": "q", "cot": "c"}']
    samples.write_text("\n".join(lines) + "\n")
    ran = asap("jobs", "submit", samples, "--watch")
    assert ran.code == 65
    assert "36 succeeded, 3 failed" in ran.err
    assert "2 × malformed-json, first at line 3: not JSON at column 2" in ran.err
    assert "1 × missing-field, line 39: field 'answer'" in ran.err


def test_a_file_of_bad_lines_is_rejected_with_the_first_of_them(asap, server, samples):
    samples.write_text(samples.read_text() + "{nope\n" * 3)
    ran = asap("jobs", "submit", samples, "--watch")
    job = ran.out.strip()
    assert ran.code == 65
    assert f"job {job} is rejected" in ran.err
    assert "3 of the first 9 lines cannot be used; at most 10%" in ran.err
    assert "malformed-json: line 7: not JSON at column 2" in ran.err
    ran = asap("jobs", "show", job)
    assert "rejected" in ran.out
    assert "line 7" in ran.out


def test_without_watch_the_id_is_all_of_stdout(asap, server, samples):
    ran = asap("jobs", "submit", samples, "--method", "original")
    job = ran.out.strip()
    assert (ran.code, ran.out) == (0, f"{job}\n")
    assert f"`asap jobs watch {job}`" in ran.err
    ran = asap("jobs", "watch", job)
    assert ran.code == 0
    assert "6 succeeded" in ran.err


def test_jobs_are_listed_and_shown(asap, server, samples, monkeypatch):
    job = asap("jobs", "submit", samples, "--keep-ratio", "0.5", "--watch").out.strip()
    ran = asap("jobs", "list", "--limit", 1)
    assert ran.code == 0
    assert ran.out.splitlines()[1].split()[0] == job
    assert ran.out.splitlines()[1].split()[-2:] == ["6/6", "0"]
    assert "--limit shows more" in ran.err
    ran = asap("jobs", "show", job)
    assert ran.code == 0
    for word in (job, "done", "keep_ratio=0.5", "method=asap", "surprisal, succeeded"):
        assert word in ran.out


def test_a_running_job_is_cancelled_and_what_is_done_stays(asap, server, held, tmp_path):
    ran = asap("jobs", "download", held, "-o", tmp_path / "early.jsonl")
    assert "0 records written" in ran.err
    assert "6 items were not finished" in ran.err
    for _ in range(2):
        ran = asap("jobs", "cancel", held)
        assert ran.code == 0
        assert f"job {held} is cancel" in ran.out
    server.anchor.open.set()
    ran = asap("jobs", "watch", held)
    assert ran.code == 65
    assert f"job {held} is cancelled" in ran.err
    assert "6 cancelled" in ran.err


def test_failed_items_run_again(asap, server, samples):
    server.anchor.refuses.set()
    ran = asap("jobs", "submit", samples, "--watch")
    job = ran.out.strip()
    assert ran.code == 65
    assert "6 × scripted, first at line 1: refused by the ␛[31mtest" in ran.err
    assert "\x1b[31m" not in ran.err
    assert "6 × scripted" in asap("jobs", "show", job).out
    server.anchor.refuses.clear()
    ran = asap("jobs", "retry", job)
    assert ran.code == 0
    assert "6 items run again" in ran.err
    assert asap("jobs", "watch", job).code == 0
    assert "no item of the job failed" in asap("jobs", "retry", job).err


def test_retry_leaves_a_running_job_alone(asap, server, held):
    ran = asap("jobs", "retry", held)
    assert ran.code == 0
    assert "nothing runs again: the job is " in ran.err


def test_a_deleted_job_is_gone(asap, server, samples):
    job = asap("jobs", "submit", samples, "--method", "original").out.strip()
    assert asap("jobs", "delete", job).code == 0
    ran = asap("jobs", "show", job)
    assert (ran.code, ran.err) == (66, f"asap: there is no job '{job}'\n")


def test_what_a_job_would_take_is_told_and_nothing_submitted(asap, server, samples):
    def ids():
        listed = asap("jobs", "list", "--limit", 500).out
        return [line.split()[0] for line in listed.splitlines()]

    before = ids()
    samples.write_text(samples.read_text() + "{nope\n")
    ran = asap("jobs", "submit", samples, "--dry-run", "--cost-cap", 1, "--watch")
    assert ran.code == 0, ran.err
    rows = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in ran.out.splitlines())
    assert (rows["records"], rows["bad lines"]) == ("6", "1")
    assert (rows["LLM calls"], rows["cost"]) == ("0", "$0.0000")
    assert int(rows["CoT tokens"].replace(",", "")) > 100
    assert "nothing was submitted" in ran.err
    assert ids() == before


def test_the_options_of_a_job_reach_the_server(asap, server, samples):
    options = ("--cost-cap", 2.5, "--deadline", 3600, "--priority", "background")
    ran = asap("jobs", "submit", samples, *options, "--watch")
    assert ran.code == 0, ran.err
    assert "cost $0.0000 of at most $2.50" in ran.err
    job = httpx.get(f"{server.url}/jobs/{ran.out.strip()}", timeout=PATIENCE_S).json()
    assert job["cost_cap_usd"] == 2.5
    assert job["deadline_at"] - job["created_at"] == pytest.approx(3600, abs=1)
    assert job["webhook"] is False


def test_a_late_job_is_told(asap, server, samples):
    server.anchor.open.clear()
    ran = asap("jobs", "submit", samples, "--deadline", 1, "--watch")
    assert ran.code == 65
    assert f"job {ran.out.strip()} is expired" in ran.err


def test_options_that_the_server_refuses(asap, server, samples):
    ran = asap("jobs", "submit", samples, "--webhook", "https://hooks.example/x")
    assert ran.code == 65
    assert "this server calls no webhooks" in ran.err
    ran = asap("jobs", "submit", samples, "--cost-cap", 1, "--set", "anchor=llm")
    assert ran.code == 65
    assert "knows no prices" in ran.err
    for wrong in (("--cost-cap", 0), ("--deadline", 0), ("--priority", "live")):
        assert asap("jobs", "submit", samples, *wrong).code == 2


def test_scores_are_used_again_at_another_target(asap, server, samples, tmp_path):
    first = asap("jobs", "submit", samples, "--keep-ratio", 0.9, "--watch").out.strip()
    server.anchor.refuses.set()  # no stage works on what comes now
    ran = asap("jobs", "rebudget", first, "--keep-ratio", 0.3, "--watch")
    assert ran.code == 0, ran.err
    second = ran.out.strip()
    assert second != first
    assert "6 succeeded" in ran.err
    assert "anchor" not in ran.err
    kept = {}
    for job in (first, second):
        assert asap("jobs", "download", job, "-o", tmp_path / "out.jsonl").code == 0
        records = [Record.model_validate(row) for row in rows(tmp_path / "out.jsonl")]
        kept[job] = sum(record.tokens.pruned for record in records)
    assert 0 < kept[second] < kept[first]


def test_what_cannot_be_rebudgeted(asap, server, held):
    ran = asap("jobs", "rebudget", held, "--max-tokens", 9)
    assert (ran.code, ran.out) == (65, "")
    assert "its records can be used again once it has ended" in ran.err
    assert asap("jobs", "rebudget", "0" * 32, "--max-tokens", 9).code == 66
    for targets in ((), ("--max-tokens", 9, "--keep-ratio", 0.5)):
        ran = asap("jobs", "rebudget", held, *targets)
        assert ran.code == 65
        assert "give exactly one of --max-tokens and --keep-ratio" in ran.err


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    with live_server(tmp_path_factory.mktemp("guarded") / "home", keyed=True) as server:
        yield server


def test_a_key_of_the_environment_opens_the_server(asap, guarded, samples, tmp_path, monkeypatch):
    monkeypatch.setenv("ASAP_SERVER", guarded.url)
    for name, role in (("ASAP_API_KEY", "submit"), ("READING", "read"), ("OTHER", "submit")):
        tenant = "b" if name == "OTHER" else "a"
        monkeypatch.setenv(name, guarded.keys.create(tenant, name, role)[1])

    ran = asap("jobs", "submit", samples, "--watch")
    assert ran.code == 0, ran.err
    job = ran.out.strip()
    assert asap("jobs", "download", job, "-o", tmp_path / "out.jsonl").code == 0
    assert len(rows(tmp_path / "out.jsonl")) == 6
    assert job in asap("jobs", "list").out

    monkeypatch.setenv("ASAP_API_KEY", os.environ["READING"])
    assert asap("jobs", "show", job).code == 0
    ran = asap("jobs", "delete", job)
    assert ran.code == 77
    assert ran.err == "asap: this needs the role 'submit'; the key has the role 'read'\n"

    monkeypatch.setenv("ASAP_API_KEY", os.environ["OTHER"])
    assert asap("jobs", "show", job).code == 66


@pytest.mark.parametrize("key", [None, "", "asap_" + "0" * 16 + "_" + "0" * 64])
def test_without_a_live_key_the_server_stays_shut(asap, guarded, samples, monkeypatch, key):
    monkeypatch.setenv("ASAP_SERVER", guarded.url)
    monkeypatch.delenv("ASAP_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("ASAP_API_KEY", key)
    for command in (
        ["list"],
        ["submit", samples],
        ["watch", "x"],
        ["rebudget", "x", "--max-tokens", 9],
    ):
        ran = asap("jobs", *command)
        assert (ran.code, ran.out) == (77, "")
        assert len(ran.err.splitlines()) == 1
        assert "ASAP_API_KEY" in ran.err
        assert not key or key not in ran.err


def test_a_key_is_not_sent_in_the_clear(asap, monkeypatch):
    monkeypatch.setenv("ASAP_API_KEY", "asap_1_2")
    ran = asap("jobs", "list", "--server", "http://example.org")
    assert ran.code == 65
    assert ran.err.startswith("asap: an API key goes over https only")
    assert "asap_1_2" not in ran.err


def test_no_help_shows_the_key(asap, monkeypatch):
    monkeypatch.setenv("ASAP_API_KEY", "asap_1_2")
    for command in ("submit", "list", "rebudget"):
        assert "asap_1_2" not in asap("jobs", command, "--help").out


@pytest.mark.parametrize("command", ["watch", "show", "cancel", "retry", "delete", "download"])
@pytest.mark.parametrize("job", ["unknown", "..", "a/b", "a?b"])
def test_an_unknown_job(asap, server, tmp_path, command, job):
    out = ["-o", tmp_path / "out.jsonl"] if command == "download" else []
    ran = asap("jobs", command, job, *out)
    assert (ran.code, ran.err) == (66, f"asap: there is no job {job!r}\n")
    assert not list(tmp_path.iterdir())


def test_no_server(asap, samples, monkeypatch):
    for command in (["list"], ["submit", samples], ["watch", "x"]):
        ran = asap("jobs", *command, "--server", "http://127.0.0.1:9")
        assert ran.code == 69
        assert ran.err.startswith("asap: no server answers at http://127.0.0.1:9; start one")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--server", "localhost:8000"], "must be a URL such as http://"),
        (["--max-tokens", "0"], "max_tokens: "),
        (["--set", "nonsense=1"], "'nonsense=1'"),
        (["--max-tokens", "9", "--keep-ratio", "0.5"], "exactly one of"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_sent(asap, samples, arguments, words):
    ran = asap("jobs", "submit", samples, *arguments)
    assert ran.code == 65
    assert words in ran.err


def test_wrong_files(asap, server, samples, tmp_path):
    assert asap("jobs", "submit", tmp_path / "none.jsonl").code == 66
    renamed = samples.rename(tmp_path / "in.txt")
    ran = asap("jobs", "submit", renamed)
    assert ran.code == 65
    assert "must end in one of" in ran.err
    for out in ("out.csv", "out.jsonl.gz", "out"):
        assert asap("jobs", "download", "x", "-o", tmp_path / out).code == 65


def test_ctrl_c_ends_the_watch_and_not_the_job(server, held):
    process = subprocess.Popen(
        [sys.executable, "-m", "asap_cli.main", "jobs", "watch", held],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "anchor 0/6" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert f"job {held} goes on" in err
    with JobsClient.open(server.url) as client:
        assert client.job(held).phase in ("queued", "running")


def test_the_watch_sees_a_job_that_is_deleted_meanwhile(asap, server, held, monkeypatch):
    show = JobProgress.show
    with JobsClient.open(server.url) as client:

        def show_and_delete(progress, job):
            show(progress, job)
            client.delete(job.id)

        monkeypatch.setattr(JobProgress, "show", show_and_delete)
        ran = asap("jobs", "watch", held)
    assert "anchor 0/6" in ran.err
    assert ran.code == 66
    assert "there is no job" in ran.err


def test_help_imports_no_client():
    code = (
        "import sys, asap_cli.main; "
        "print([m for m in ('httpx', 'tenacity', 'sqlalchemy', 'fastapi') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout.replace("'", '"')) == []
