"""A training job's data is gathered from stored records, on every database."""

from __future__ import annotations

import json

import pytest

from asap.config import PruneConfig
from asap.errors import UpstreamUnavailable
from asap.payloads import read_payload
from asap.train_config import TrainConfig
from asap.types import Record, Triple
from asap_runtime.blobs import BlobStore
from asap_runtime.ingest import Ingester, IntakeLimits
from asap_runtime.intake import StoredRun
from asap_runtime.takings import Takings
from asap_runtime.values import ItemProblem, NewItem
from job_store import TENANT

CONFIG = PruneConfig(method="original", keep_ratio=0.5)
LOST = ItemProblem("no-code", "there was no code")


@pytest.fixture
def blobs(tmp_path):
    return BlobStore.in_folder(tmp_path / "blobs")


@pytest.fixture
def announced():
    return []


@pytest.fixture
def ingester(platform, blobs, announced):
    return Ingester(platform.database, blobs, IntakeLimits(), announced.append)


def pruned(platform, ids, *, tenant=TENANT, failed=0, config=CONFIG):
    """An ended prune job with these records, and some failed items before them."""
    job_id = platform.intake.create_job(tenant, "prune", config.model_dump(mode="json"), 5)
    records = [
        Record(triple=Triple(id=id, question="q", cot="a\n\nb", answer="x"), config=config)
        for id in ids
    ]
    bad = [NewItem(n, None, None, problem=LOST) for n in range(1, failed + 1)]
    good = [
        NewItem(n, None, record.model_dump_json().encode())
        for n, record in enumerate(records, failed + 1)
    ]
    platform.intake.add_items(job_id, bad + good)
    platform.intake.mark_ingested(job_id)
    platform.sweep.finish_jobs(10)
    return job_id


@pytest.fixture
def training(platform):
    def submit(*sources, config=None):
        config = config or TrainConfig(epochs=3)
        source = StoredRun("demo", "coder", sources)
        values = config.model_dump(mode="json")
        return platform.intake.create_job(TENANT, "train", values, 5, source=source)

    return submit


def stored(blobs, key, data):
    with blobs.create(key) as writer:
        writer.write(data)
    return key


def ids_in(blobs, key):
    with blobs.open(key) as stream:
        return [json.loads(line)["triple"]["id"] for line in stream]


def run_of(platform, job_id):
    return read_payload(platform.ledger.first_payload(TENANT, job_id))


def test_the_records_of_a_job_become_the_data_of_one_item(
    platform, blobs, training, ingester, announced
):
    ids = [str(n) for n in range(250)]
    source = pruned(platform, ids, failed=3)
    job_id = training(source)
    assert platform.phase(job_id) == "validating"
    assert ingester.take_in()
    assert announced == [job_id]
    run = run_of(platform, job_id)
    assert (run.id, run.tenant, run.base, run.model) == (job_id, TENANT, "demo", "coder")
    assert run.config == TrainConfig(epochs=3)
    assert run.data == f"{TENANT}/runs/{job_id}/data.jsonl"
    assert run.meta == {"job": source, "method": "original", "keep_ratio": 0.5}
    assert ids_in(blobs, run.data) == ids
    [claim] = platform.claim(stage="trainer")
    assert (claim.job_id, read_payload(claim.payload)) == (job_id, run)


def test_a_row_says_what_the_record_says(platform, blobs, training, ingester):
    job_id = training(pruned(platform, ["one"]))
    ingester.take_in()
    with blobs.open(run_of(platform, job_id).data) as stream:
        row = json.loads(stream.read())
    record = Record.model_validate(row)
    assert (row["pruned_cot"], row["status"]) == (record.pruned_cot, record.status)


def test_a_stored_file_is_trained_on_where_it_lies(platform, blobs, training, ingester):
    key = stored(blobs, f"{TENANT}/sets/mine.jsonl", b'{"question": "q"}\n')
    job_id = training(key)
    ingester.take_in()
    run = run_of(platform, job_id)
    assert (run.data, run.meta) == (key, {"dataset": key})
    assert list(blobs.keys_below(f"{TENANT}/runs")) == []


def test_what_must_be_in_common_is_gathered_as_well(platform, blobs, training, ingester):
    key = stored(blobs, f"{TENANT}/sets/other.jsonl", b"{}\n")
    first, second = pruned(platform, ["a", "b"]), pruned(platform, ["b", "c"])
    job_id = training(first, key, second)
    ingester.take_in()
    run = run_of(platform, job_id)
    folder = f"{TENANT}/runs/{job_id}"
    assert (run.data, run.common_with) == (
        f"{folder}/data.jsonl",
        (key, f"{folder}/common-2.jsonl"),
    )
    assert ids_in(blobs, run.data) == ["a", "b"]
    assert ids_in(blobs, run.common_with[1]) == ["b", "c"]


def test_nothing_to_train_on_rejects_the_job(platform, blobs, training, ingester):
    empty = stored(blobs, f"{TENANT}/sets/empty.jsonl", b"")
    full = pruned(platform, ["a"])
    theirs = pruned(platform, ["a"], tenant="b")
    running = platform.job(1)
    for sources, code in (
        ((pruned(platform, [], failed=2),), "invalid-input"),
        ((empty,), "invalid-input"),
        ((full, empty), "invalid-input"),
        ((f"{TENANT}/sets/gone.jsonl",), "not-found"),
        (("0" * 32,), "not-found"),
        ((theirs,), "not-found"),
        ((full, theirs), "not-found"),
        ((running,), "results-not-ready"),
    ):
        job_id = training(*sources)
        assert ingester.take_in()
        view = platform.ledger.job(TENANT, job_id)
        assert (view.phase, [p.code for p in view.problems]) == ("rejected", [code]), sources
        assert platform.claim(stage="trainer") == []


class Interrupted(BlobStore):
    """Something happens when a blob of ours is half written, once."""

    def __init__(self, folder, event):
        inner = BlobStore.in_folder(folder)
        super().__init__(inner._fs, "file", inner._root)
        self._event = event

    def create(self, key):
        writer, store = super().create(key), self
        write = writer.write

        def noted(data):
            write(data)
            if store._event is not None and writer.size > 20_000:
                event, store._event = store._event, None
                event()

        writer.write = noted
        return writer


@pytest.fixture
def interrupted(platform, tmp_path, announced):
    def make(event, **options):
        blobs = Interrupted(tmp_path / "blobs", event)
        return Ingester(platform.database, blobs, IntakeLimits(), announced.append, **options)

    return make


MANY = [str(n) for n in range(400)]


def test_what_a_process_left_half_done_is_done_again(
    platform, blobs, training, interrupted, ingester
):
    def broken():
        raise UpstreamUnavailable("the store is away", code="blob-unavailable")

    job_id = training(pruned(platform, MANY))
    assert interrupted(broken).take_in()
    assert platform.phase(job_id) == "validating"
    assert blobs.keys_below(f"{TENANT}/runs") == [], "half a file is none"
    assert not ingester.take_in(), "the lease is held"
    platform.pass_time(61)
    assert ingester.take_in()
    assert ids_in(blobs, run_of(platform, job_id).data) == MANY


def test_a_process_that_leaves_gives_its_lease_back(platform, training, interrupted, ingester):
    job_id = training(pruned(platform, MANY))
    leaving = interrupted(lambda: leaving._stopping.set())
    assert leaving.take_in()
    assert platform.phase(job_id) == "validating"
    assert ingester.take_in()
    assert len(platform.ledger.items(TENANT, job_id)) == 1


def test_an_item_that_is_in_is_not_put_in_twice(platform, training, ingester, announced):
    job_id = training(pruned(platform, ["a"]))
    dead = Takings(platform.database)
    taking = dead.take()
    dead.add(taking, [NewItem(1, "trainer", b"{}")])
    platform.pass_time(61)
    assert ingester.take_in()
    assert announced == [job_id]
    assert len(platform.ledger.items(TENANT, job_id)) == 1


def test_the_lease_is_kept_while_the_records_are_written(
    platform, training, interrupted, announced
):
    job_id = training(pruned(platform, MANY))
    others = []

    def late():
        others.append(Takings(platform.database).take())

    ingester = interrupted(late)
    ingester._beat_s = 0.0  # at each hundredth record
    leases = []
    keep = ingester._takings.keep
    ingester._takings.keep = lambda taking: (keep(taking), leases.append(taking.lease))
    assert ingester.take_in()
    assert others == [None]
    assert len(leases) == 4
    assert leases == sorted(leases)
    assert announced == [job_id]


@pytest.mark.parametrize("stop", ["cancel", "delete"])
def test_a_stopped_job_ends_the_export(platform, blobs, training, interrupted, announced, stop):
    job_id = training(pruned(platform, MANY))
    ingester = interrupted(lambda: getattr(platform.ledger, stop)(TENANT, job_id))
    ingester._beat_s = 0.0
    assert ingester.take_in()
    assert announced == []
    assert blobs.keys_below(f"{TENANT}/runs") == []
    assert platform.claim(stage="trainer") == []


def test_records_that_change_meanwhile_are_not_trained_on(platform, blobs, training, interrupted):
    source = pruned(platform, MANY)
    job_id = training(source)
    assert interrupted(lambda: platform.ledger.delete(TENANT, source)).take_in()
    view = platform.ledger.job(TENANT, job_id)
    assert (view.phase, view.problems[0].code) == ("rejected", "results-not-ready")
    assert blobs.keys_below(f"{TENANT}/runs") == []
