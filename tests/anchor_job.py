"""A job through the anchor stage alone: real HTTP, database, queue and runner."""

from __future__ import annotations

from asap.config import PruneConfig
from asap.types import Record, Triple
from asap_anchor.stage import AnchorStage
from asap_runtime.host import StageHost, open_database
from asap_runtime.intake import JobIntake
from asap_runtime.ledger import JobLedger
from asap_runtime.queue import BATCH, MemoryQueue
from asap_runtime.stage import RunnerLimits
from asap_runtime.values import NewItem
from openai_server import Reply
from waiting import until

COT = "first we read the list\n\nthen we sort it\n\nthen we print the list"


def answer(prompt: str, body: dict) -> Reply:
    """Accepted at once; the prompt of the direct CoT is the one without the trace."""
    return Reply("then we sort it" if COT.split("\n\n", maxsplit=1)[0] in prompt else "sort it")


async def run(settings, questions, stage=None, **config):
    """A job of these questions through the anchor stage alone: its view, items and results."""
    database = open_database(settings)
    intake, ledger = JobIntake(database), JobLedger(database)
    config = PruneConfig(method="asap_stage1", **config)
    host = StageHost(
        database,
        MemoryQueue(),
        [stage or AnchorStage(settings)],
        limits=RunnerLimits(max_attempts=2, backoff_base_s=0.01),
        sweep_period_s=0.05,
    )
    async with host:
        job = intake.create_job("t", "prune", {}, BATCH)
        triples = [Triple(question=question, cot=COT, answer="sorted") for question in questions]
        records = [Record(triple=triple, config=config) for triple in triples]
        payloads = [record.model_dump_json().encode() for record in records]
        intake.add_items(job, (NewItem(n, "anchor", p) for n, p in enumerate(payloads, 1)))
        intake.mark_ingested(job)
        await until(lambda: ledger.job("t", job).phase == "done")
    view = ledger.job("t", job)
    assert view.phase == "done"
    items, results = ledger.items("t", job), list(ledger.results("t", job))
    database.close()
    return view, items, results
