"""A job is deleted with its files, on every database."""

from __future__ import annotations

import pytest

from asap.errors import UpstreamUnavailable
from asap_runtime.blobs import BlobStore
from asap_runtime.models import ModelRegistry
from asap_runtime.retention import Retention
from asap_runtime.run_removal import JobRemoval
from asap_runtime.values import NewItem
from job_store import TENANT, a_model

DAY = 24 * 3600


@pytest.fixture
def blobs(tmp_path):
    return BlobStore.in_folder(tmp_path / "blobs")


@pytest.fixture
def registry(database):
    return ModelRegistry(database)


@pytest.fixture
def removal(database, blobs):
    return JobRemoval(database, blobs)


@pytest.fixture
def training(platform, blobs):
    """A training job with its files."""

    def make(kind="train"):
        job_id = platform.intake.create_job(TENANT, kind, {}, 5)
        platform.intake.add_items(job_id, [NewItem(1, None, b"{}")])
        platform.intake.mark_ingested(job_id)
        platform.sweep.finish_jobs(10)
        for name in ("data.jsonl", "checkpoints/step-1/a", "model/a", "model/manifest.json"):
            with blobs.create(f"{TENANT}/runs/{job_id}/{name}") as writer:
                writer.write(b"x")
        return job_id

    return make


def left(blobs, job_id):
    folder = f"{TENANT}/runs/{job_id}"
    return [key.removeprefix(f"{folder}/") for key in blobs.keys_below(folder)]


def test_a_run_goes_whole_unless_its_model_is_registered(
    platform, blobs, registry, removal, training
):
    plain, registered, removed, other = (training() for _ in range(4))
    a_model(registry, "x", registered)
    a_model(registry, "x", removed)
    registry.remove(TENANT, "x", 2)
    for job_id in (plain, registered, removed):
        assert removal.delete(TENANT, job_id)
        assert platform.ledger.job(TENANT, job_id) is None
    assert left(blobs, plain) == left(blobs, removed) == []
    assert left(blobs, registered) == ["model/a", "model/manifest.json"]
    assert len(left(blobs, other)) == 4


def test_another_tenant_deletes_nothing(platform, blobs, removal, training):
    job_id = training()
    assert not removal.delete("b", job_id)
    assert len(left(blobs, job_id)) == 4
    assert platform.ledger.job(TENANT, job_id) is not None


def test_a_store_that_is_away_leaves_a_job_to_delete_again(
    platform, blobs, removal, training, monkeypatch
):
    job_id = training()

    def away(folder):
        raise UpstreamUnavailable("the store is away", code="blob-unavailable")

    with monkeypatch.context() as patch:
        patch.setattr(blobs, "delete_below", away)
        with pytest.raises(UpstreamUnavailable):
            removal.delete(TENANT, job_id)
    assert platform.ledger.job(TENANT, job_id) is not None
    assert removal.delete(TENANT, job_id)
    assert left(blobs, job_id) == []


def test_what_was_written_after_the_end_is_deleted_later(
    platform, blobs, registry, removal, training
):
    plain, registered = training(), training()
    a_model(registry, "x", registered)
    for job_id in (plain, registered):
        removal.delete(TENANT, job_id)
        with blobs.create(f"{TENANT}/runs/{job_id}/checkpoints/step-2/a") as writer:
            writer.write(b"x")
    assert removal.repeat() == 0
    platform.pass_time(3601)
    assert removal.repeat() == 2
    assert left(blobs, plain) == []
    assert left(blobs, registered) == ["model/a", "model/manifest.json"]
    assert removal.repeat() == 0


def test_retention_deletes_the_files_of_old_runs(platform, blobs, registry, training):
    plain, registered = training(), training()
    a_model(registry, "x", registered)
    platform.pass_time(31 * DAY)
    young = training()
    Retention(platform.database, blobs).sweep()
    assert {view.id for view in platform.ledger.jobs(TENANT)} == {young}
    assert left(blobs, plain) == []
    assert left(blobs, registered) == ["model/a", "model/manifest.json"]
    assert len(left(blobs, young)) == 4
    assert registry.get(TENANT, "x", 1).job_id == registered
