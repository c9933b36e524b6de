"""`asap worker surprisal` whose device has lost its memory: it leaves, and nothing is lost."""

from __future__ import annotations

import pytest
import torch
from sqlalchemy import select

from asap.config import PruneConfig
from asap.types import Record, Triple
from asap_runtime.host import open_database
from asap_runtime.intake import JobIntake
from asap_runtime.settings import RuntimeSettings
from asap_runtime.tables import items
from asap_runtime.values import NewItem
from asap_surprisal import scorer


@pytest.fixture
def database(monkeypatch, tmp_path, tiny_model_dir):
    monkeypatch.setenv("ASAP_HOME", str(tmp_path))
    monkeypatch.setenv("ASAP_SURPRISAL__MODEL", str(tiny_model_dir))
    monkeypatch.setenv("ASAP_SURPRISAL__DEVICE", "cpu")
    monkeypatch.chdir(tmp_path)
    opened = open_database(RuntimeSettings(home=tmp_path))
    yield opened
    opened.close()


def job_of(database, count):
    intake = JobIntake(database)
    job = intake.create_job("t", "prune", {}, 5)
    config = PruneConfig(method="asap_stage2", max_tokens=1)
    records = [
        Record(triple=Triple(question=f"q{i}", cot="a\n\nb", answer="x"), config=config)
        for i in range(count)
    ]
    payloads = [record.model_dump_json().encode() for record in records]
    intake.add_items(job, (NewItem(i, "surprisal", p) for i, p in enumerate(payloads, 1)))
    intake.mark_ingested(job)


def test_a_worker_without_memory_gives_its_items_back_and_leaves_with_75(
    asap, database, monkeypatch
):
    job_of(database, 12)
    texts = []

    def full(model, rows):
        texts.append(len(rows))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(scorer, "launch", full)
    ran = asap("worker", "surprisal")
    assert (ran.code, "given back" in ran.err) == (75, True)
    assert texts.count(1) >= 2
    with database.engine.connect() as connection:
        rows = connection.execute(
            select(items.c.status, items.c.lease_owner, items.c.attempt)
        ).all()
    assert rows == [("queued", None, 0)] * 12
