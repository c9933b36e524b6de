"""Stored files become items exactly once, whoever is killed, on every database."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from asap.config import PruneConfig
from asap.errors import InvalidInput, UpstreamUnavailable
from asap_runtime.blobs import BlobStore
from asap_runtime.ingest import Ingester, IntakeLimits, detect, new_item
from asap_runtime.intake import StoredLines, in_batches
from asap_runtime.json_lines import ReadLimits, read_json_lines
from asap_runtime.schemas import read_triples
from asap_runtime.takings import Takings
from asap_runtime.values import NewItem
from job_store import PROBLEM, TENANT, take_all_in
from waiting import PATIENCE_S

TRIPLE = {"question": "q", "cot": "first\n\nsecond", "answer": "a"}
PAUSE_S = 0.02


@pytest.fixture
def blobs(tmp_path):
    return BlobStore.in_folder(tmp_path / "blobs")


@pytest.fixture
def stored(platform, blobs):
    """Store bytes and make a job of them: (job id, key)."""

    def store(data, ending=".jsonl", *, owned=True, method="asap", **options):
        key = blobs.upload_key(TENANT, ending)
        with blobs.create(key) as writer:
            writer.write(data)
        config = PruneConfig(method=method).model_dump(mode="json")
        source = StoredLines(key, ending, "triple", owned)
        job = platform.intake.create_job(TENANT, "prune", config, 5, source=source, **options)
        return job, key

    return store


@pytest.fixture
def announced():
    return []


@pytest.fixture
def ingester(platform, blobs, announced):
    return Ingester(platform.database, blobs, IntakeLimits(), announced.append)


def lines(count, start=1):
    return b"".join(
        json.dumps({**TRIPLE, "id": str(n)}).encode() + b"\n" for n in range(start, start + count)
    )


def taken(platform, job_id):
    return [item.line for item in platform.ledger.items(TENANT, job_id, limit=100_000)]


def test_a_stored_file_becomes_items_and_is_deleted(platform, blobs, stored, ingester, announced):
    job, _ = stored(lines(1200))
    assert platform.phase(job) == "validating"
    assert platform.claim(stage="anchor") == []
    assert ingester.take_in()
    assert not ingester.take_in()
    assert taken(platform, job) == list(range(1, 1201))
    assert platform.phase(job) == "queued"
    assert announced == [job]
    assert list(blobs.uploads()) == []
    [claim] = platform.claim(1, "anchor")
    assert json.loads(claim.payload)["triple"]["id"] == "1"


def test_without_a_stage_the_items_are_results_at_once(platform, stored, ingester, announced):
    job, _ = stored(lines(2), method="original")
    ingester.take_in()
    assert [json.loads(r.payload)["pruned_cot"] for r in platform.results(job)] == [
        TRIPLE["cot"], TRIPLE["cot"]
    ]  # fmt: skip
    assert announced == [job]


def test_a_data_set_stays(blobs, stored, ingester):
    _, key = stored(lines(2), owned=False)
    ingester.take_in()
    assert blobs.size(key) == len(lines(2))


def test_the_more_urgent_job_goes_first(platform, stored):
    background = platform.intake.create_job(
        TENANT, "prune", {}, 9, source=StoredLines("a/uploads/x", ".jsonl", "triple", True)
    )
    batch, _ = stored(b"")
    takings = Takings(platform.database)
    assert [takings.take().job_id for _ in range(2)] == [batch, background]
    assert takings.take() is None


def test_what_a_dead_process_left_is_gone_on_with(platform, stored, blobs, ingester):
    job, key = stored(lines(1700))
    dead = Takings(platform.database)
    taking = dead.take()
    first = in_batches(new_item(n, t, PruneConfig()) for n, t in _read(blobs, key))
    dead.add(taking, next(first))
    assert not ingester.take_in(), "the lease is held"
    platform.pass_time(61)
    assert ingester.take_in()
    assert taken(platform, job) == list(range(1, 1701))
    with pytest.raises(InvalidInput) as caught:
        dead.add(taking, next(first))
    assert caught.value.problem_code == "job-finished"
    assert not dead.finish(taking)
    assert not dead.reject(taking, PROBLEM)
    assert taken(platform, job) == list(range(1, 1701))


def test_a_process_that_wakes_too_late_writes_nothing(platform, stored):
    job, _ = stored(lines(3))
    late, other = Takings(platform.database), Takings(platform.database)
    asleep = late.take()
    platform.pass_time(61)
    taking = other.take()
    assert taking.job_id == job
    with pytest.raises(InvalidInput):
        late.add(asleep, [NewItem(1, "anchor", b"{}")])
    late.release(asleep)
    assert other.take() is None, "a lost lease cannot be given back"
    other.add(taking, [NewItem(1, "anchor", b"{}")])
    assert taken(platform, job) == [1]


def test_a_lease_grows_with_each_batch_and_can_be_given_back(platform, stored):
    job, _ = stored(lines(3))
    takings = Takings(platform.database)
    taking = takings.take()
    platform.pass_time(35)
    taking.lease -= 35_000_000
    takings.add(taking, [NewItem(1, "anchor", b"{}")])
    platform.pass_time(35)
    taking.lease -= 35_000_000
    assert takings.take() is None
    takings.release(taking)
    again = takings.take()
    assert (again.job_id, again.line, again.items, again.bad) == (job, 1, 1, 0)


def test_a_killed_process_loses_and_doubles_nothing(
    platform, database_url, stored, blobs, ingester, tmp_path
):
    job, _ = stored(lines(3_000))
    code = f"""
import itertools, os, signal
from pathlib import Path
from sqlalchemy import event
from asap_runtime.blobs import BlobStore
from asap_runtime.database import Database, open_engine
from asap_runtime.ingest import Ingester, IntakeLimits
blobs = BlobStore.in_folder(Path({str(tmp_path / "blobs")!r}))
database = Database(open_engine({database_url!r}))
batches = itertools.count(1)
@event.listens_for(database.engine, "after_cursor_execute")
def die_in_the_third(connection, cursor, statement, *_):
    if statement.startswith("INSERT INTO items") and next(batches) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
Ingester(database, blobs, IntakeLimits(), print).take_in()
"""
    ran = subprocess.run([sys.executable, "-c", code], check=False)
    assert ran.returncode == -signal.SIGKILL
    assert taken(platform, job) == list(range(1, 1001))
    assert platform.phase(job) == "validating", "it was killed before the end"
    platform.pass_time(61)
    assert ingester.take_in()
    assert taken(platform, job) == list(range(1, 3_001))


def test_processes_that_race_for_the_same_files_share_them(
    platform, database_url, stored, racers, tmp_path
):
    jobs = [stored(lines(700))[0] for _ in range(6)]
    folder = str(tmp_path / "blobs")
    done = list(racers.map(take_all_in, [database_url] * 4, [folder] * 4))
    assert sorted(job for jobs_ in done for job in jobs_) == sorted(jobs)
    for job in jobs:
        assert taken(platform, job) == list(range(1, 701))


class Interrupted(BlobStore):
    """Something happens when the second half of a file is asked for."""

    def __init__(self, inner, event):
        self._inner, self._event = inner, event

    def open(self, key):
        stream, event, store = self._inner.open(key), self._event, self

        class Stream:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                stream.close()

            def readline(self, size):
                line = stream.readline(size)
                if line == b"\n" and store._event is not None:
                    store._event = None
                    event()
                return line

        return Stream()

    def delete(self, key):
        self._inner.delete(key)


@pytest.fixture
def interrupted(platform, blobs, announced):
    def make(event):
        return Ingester(
            platform.database,
            Interrupted(blobs, event),
            IntakeLimits(),
            announced.append,
        )

    return make


HALVES = lines(700) + b"\n" + lines(700, 702)


def test_cancelling_stops_the_intake(platform, stored, interrupted, announced):
    job, _ = stored(HALVES)
    assert interrupted(lambda: platform.ledger.cancel(TENANT, job)).take_in()
    assert len(taken(platform, job)) == 500
    assert platform.phase(job) == "cancelled"
    assert announced == []


def test_a_deleted_job_is_not_brought_back(platform, stored, interrupted):
    job, _ = stored(HALVES)
    assert interrupted(lambda: platform.ledger.delete(TENANT, job)).take_in()
    assert platform.ledger.job(TENANT, job) is None
    assert taken(platform, job) == []


def test_a_process_that_leaves_gives_its_lease_back(platform, stored, interrupted, ingester):
    job, _ = stored(HALVES)
    leaving = interrupted(lambda: leaving._stopping.set())
    leaving.take_in()
    assert platform.phase(job) == "validating"
    assert ingester.take_in()
    assert taken(platform, job) == [*range(1, 701), *range(702, 1402)]


def test_trouble_with_the_store_is_tried_again(platform, stored, interrupted, ingester):
    def broken():
        raise UpstreamUnavailable("the store is away", code="blob-unavailable")

    job, _ = stored(HALVES)
    assert interrupted(broken).take_in()
    assert platform.phase(job) == "validating"
    assert not ingester.take_in()
    platform.pass_time(61)
    assert ingester.take_in()
    assert len(taken(platform, job)) == 1400


def test_an_error_of_ours_rejects_the_job_and_says_no_more(platform, stored, interrupted):
    job, _ = stored(HALVES)
    assert interrupted(lambda: 1 / 0).take_in()
    view = platform.ledger.job(TENANT, job)
    assert (view.phase, [p.code for p in view.problems]) == ("rejected", ["internal-error"])
    assert "zero" not in view.problems[0].detail


BAD = b"{broken\n"


@pytest.mark.parametrize(
    ("data", "phase", "codes"),
    [
        (lines(20) + BAD * 2, "running", []),
        (lines(18) + BAD * 3, "rejected", ["invalid-input", *["malformed-json"] * 3]),
        (BAD + lines(9), "running", []),
        (BAD + lines(2), "rejected", ["invalid-input", "malformed-json"]),
        (BAD * 600, "rejected", ["invalid-input", *["malformed-json"] * 99]),
        (lines(10_000) + BAD * 50 + lines(10), "running", []),
    ],
    ids=["a few", "too many", "a tenth", "a third", "all", "many good ones"],
)
def test_bad_lines_reject_a_job_above_their_share(platform, stored, ingester, data, phase, codes):
    job, _ = stored(data)
    ingester.take_in()
    view = platform.ledger.job(TENANT, job)
    assert (view.phase, [problem.code for problem in view.problems]) == (phase, codes)


@pytest.mark.parametrize(
    ("data", "ending", "code"),
    [
        (lines(12), ".jsonl", "too-many-items"),
        (lines(3) + BAD * 4, ".jsonl", "invalid-input"),
        (b"\x1f\x8b broken", ".jsonl.gz", "invalid-input"),
        (b"no parquet", ".parquet", "invalid-input"),
    ],
)
def test_what_cannot_be_used_is_rejected_and_deleted(platform, blobs, stored, data, ending, code):
    job, _ = stored(data, ending)
    limits = IntakeLimits(max_items=10, max_bad_lines=3, max_bad_share=0.9)
    Ingester(platform.database, blobs, limits, print).take_in()
    view = platform.ledger.job(TENANT, job)
    assert (view.phase, view.problems[0].code) == ("rejected", code)
    assert list(blobs.uploads()) == []
    platform.sweep.end_items(100)
    assert platform.sweep.finish_jobs(10) == 1


def test_bad_lines_are_counted_over_a_restart(platform, stored, ingester):
    job, _ = stored(BAD * 60 + lines(440) + lines(50, 501))
    takings = Takings(platform.database)
    taking = takings.take()
    bad = [new_item(n, InvalidInput("bad"), PruneConfig()) for n in range(1, 61)]
    good = [NewItem(n, "anchor", b"{}") for n in range(61, 501)]
    takings.add(taking, bad + good)
    takings.release(taking)
    ingester.take_in()
    assert platform.phase(job) == "rejected", "60 of 550 are more than a tenth"


def test_a_file_that_is_gone_rejects_its_job(platform, blobs, stored, ingester):
    job, key = stored(lines(1))
    blobs.delete(key)
    ingester.take_in()
    view = platform.ledger.job(TENANT, job)
    assert (view.phase, view.problems[0].code) == ("rejected", "not-found")


def test_uploads_that_no_job_waits_for_are_deleted_after_a_day(platform, blobs, stored, tmp_path):
    _, waiting = stored(lines(1))
    ended, _ = stored(lines(1))
    platform.ledger.cancel(TENANT, ended)
    young = blobs.upload_key("b", ".jsonl")
    with blobs.create(young) as writer:
        writer.write(b"x")
    half_written = tmp_path / "blobs" / "b" / "uploads" / ".x.jsonl.part"
    half_written.write_bytes(b"x")
    data_set = tmp_path / "blobs" / TENANT / "sets" / "old.jsonl"
    data_set.parent.mkdir()
    data_set.write_bytes(b"x")
    for path in (tmp_path / "blobs").rglob("*.*"):
        if path.is_file() and young not in str(path):
            os.utime(path, (time.time() - 90_000,) * 2)
    assert Ingester(platform.database, blobs, IntakeLimits(), print).delete_orphans() == 2
    assert {blob.key for blob in blobs.uploads()} == {waiting, young}
    assert data_set.exists()
    assert not half_written.exists()


def test_running_it_takes_in_what_comes(platform, stored, ingester, announced):
    with ingester:
        jobs = [stored(lines(3))[0] for _ in range(3)]
        ingester.wake()
        deadline = time.monotonic() + PATIENCE_S
        while len(announced) < 3 and time.monotonic() < deadline:
            time.sleep(PAUSE_S)
    assert set(announced) == set(jobs)


def test_the_schema_is_that_of_the_first_lines(blobs):
    for data, schema in (
        (lines(1), "triple"),
        (b'{"messages": []}\n', "messages"),
        (BAD + lines(1), "triple"),
    ):
        key = blobs.upload_key(TENANT, ".jsonl")
        with blobs.create(key) as writer:
            writer.write(data)
        assert detect(blobs, key, ".jsonl", IntakeLimits()) == schema


def _read(blobs, key):
    return read_triples(read_json_lines(blobs.open(key), ReadLimits()), "triple")
