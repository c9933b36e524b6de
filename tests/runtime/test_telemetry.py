"""Logs and traces as they leave the process: read from stderr, and received by a real collector."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys

import pytest
from prometheus_client import REGISTRY

from asap.config import PruneConfig
from asap.ports import ScoreRequest
from asap.types import Record, Triple
from asap_anchor.settings import AnchorSettings
from asap_anchor.stage import AnchorStage
from asap_runtime.database import Database, open_engine
from asap_runtime.host import StageHost
from asap_runtime.intake import JobIntake
from asap_runtime.ledger import JobLedger
from asap_runtime.logs import configure_logs, get_logger
from asap_runtime.migrate import upgrade
from asap_runtime.queue import BATCH, MemoryQueue, Message
from asap_runtime.settings import TelemetrySettings
from asap_runtime.stage import Done
from asap_runtime.store import JobStore
from asap_runtime.telemetry import (
    configure_traces,
    span,
    trace_carrier,
    trace_context,
    trace_parent,
)
from asap_runtime.values import NewItem, Outcome
from asap_surprisal.batcher import BatchingScorer
from fakes import TableScorer
from job_store import Platform
from openai_server import OpenAIServer, Reply
from otlp_receiver import collector
from waiting import PATIENCE_S, until

COT = "planted first step.\n\nplanted second step.\n\nplanted third step."


@pytest.fixture
def traced(monkeypatch):
    """A collector to which this process sends, until `finish` is called."""
    for limit in ("EXPORT_S", "FLUSH_S"):
        monkeypatch.setattr(f"asap_runtime.telemetry.{limit}", PATIENCE_S)
    with collector() as kept:
        shutdown = configure_traces(TelemetrySettings(otlp_endpoint=kept.url), "test")
        kept.finish = shutdown
        yield kept
        shutdown()


class BatchingStage:
    """The surprisal stage with a table for a model, behind the real batcher."""

    name, concurrency = "surprisal", 8

    def __init__(self):
        self.scorer = BatchingScorer(TableScorer(lambda s: [1.0] * len(s)), max_batch_tokens=1000)

    async def start(self):
        self.scorer.start()

    async def process(self, record):
        await self.scorer.score(
            [ScoreRequest(record.triple.question, record.coarse_steps, ("first_token_surprisal",))]
        )
        return Done(record)

    async def stop(self):
        await self.scorer.stop()


def submit(database, queue, count):
    """As the gateway does it: rows first, then a message."""
    intake, config = JobIntake(database), PruneConfig(match="paper", protocol="rewrite")
    with span("submit"):
        job = intake.create_job("t", "prune", {}, BATCH, trace=trace_parent())
        items = [
            NewItem(
                line,
                "anchor",
                Record(
                    triple=Triple(question=f"planted {line}", cot=COT, answer="planted"),
                    config=config,
                )
                .model_dump_json()
                .encode(),
            )
            for line in range(1, count + 1)
        ]
        intake.add_items(job, items)
        intake.mark_ingested(job)
        queue.publish(Message("anchor", ("1",), BATCH, trace_context()))
    return job


async def ended(database, job):
    ledger = JobLedger(database)
    await until(lambda: ledger.job("t", job).phase == "done")
    return list(ledger.results("t", job))


def test_one_trace_leads_from_the_gateway_to_the_batch(tmp_path, traced, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url = f"sqlite:///{tmp_path}/asap.db"
    upgrade(url)
    database = Database(open_engine(url))
    with OpenAIServer([Reply(COT)]) as server:
        llm = {"base_url": server.base_url, "model": "tiny", "api_key": "planted-key"}
        anchor = AnchorStage(AnchorSettings(home=tmp_path, llm=llm))

        async def run():
            host = StageHost(
                database, MemoryQueue(), [anchor, BatchingStage()], sweep_period_s=0.05
            )
            async with host:
                # the second item is found by the sweeper, whose messages carry no context
                return await ended(database, submit(database, host.queue, 2))

        results = asyncio.run(run())
    database.close()
    traced.finish()
    assert [result.status for result in results] == ["succeeded"] * 2
    assert (traced.roles, traced.paths) == ({"asap-test"}, {"/v1/traces"})
    [root] = traced.named("submit")
    assert {s.name for s in traced.spans} == {
        "submit", "stage anchor", "chat tiny", "stage surprisal", "score batch"
    }  # fmt: skip
    assert {s.trace_id for s in traced.spans} == {root.trace_id}
    parents = {s.span_id: s.parent_span_id for s in traced.spans}
    assert [s for s, parent in parents.items() if parent not in parents] == [root.span_id]
    for stage in ("anchor", "surprisal"):
        spans = traced.named(f"stage {stage}")
        assert len(spans) == 2
        assert {s.parent_span_id for s in spans} == {root.span_id}
    stages = {s.span_id for s in traced.named("stage surprisal")}
    assert {s.parent_span_id for s in traced.named("score batch")} <= stages
    chats = {s.parent_span_id for s in traced.named("chat tiny")}
    assert chats == {s.span_id for s in traced.named("stage anchor")}
    assert not any(b"planted" in body for body in traced.bodies)


async def test_a_batch_is_a_child_of_its_first_item_and_names_the_others(traced):
    class Held(TableScorer):
        gate = asyncio.Event()
        batches = 0

        async def score(self, requests):
            self.batches += 1
            await self.gate.wait()
            return await super().score(requests)

    scorer = Held(lambda steps: [1.0])
    batching = BatchingScorer(scorer, max_batch_tokens=100)
    batching.start()
    ids = []

    async def one(name):
        with span("item", {}):
            ids.append(bytes.fromhex(trace_parent().split("-")[2]))
            await batching.score([ScoreRequest(name, ("w",), ("first_token_surprisal",))])

    calls = []
    for held in (1, 2):  # so many batches the scorer takes at a time
        calls.append(asyncio.create_task(one("held")))
        while scorer.batches < held:  # noqa: ASYNC110 - a number, not an event
            await asyncio.sleep(0.001)
    calls += [asyncio.create_task(one(name)) for name in "abc"]
    while batching.waiting_tokens < 9:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    Held.gate.set()
    await asyncio.gather(*calls)
    await batching.stop()
    await asyncio.to_thread(traced.finish)
    *_, last = sorted(traced.named("score batch"), key=lambda s: s.start_time_unix_nano)
    assert last.parent_span_id in ids[2:]
    assert {last.parent_span_id, *(link.span_id for link in last.links)} == set(ids[2:])


def test_a_span_tells_the_class_of_an_error_and_not_its_words(traced):
    with pytest.raises(ValueError, match="planted"), span("work", items=3):
        raise ValueError("planted")
    traced.finish()
    [sent] = traced.named("work")
    assert sent.status.message == "ValueError"
    assert not sent.events
    assert [(a.key, a.value.int_value) for a in sent.attributes] == [("asap.items", 3)]
    assert not any(b"planted" in body for body in traced.bodies)


def test_an_empty_carrier_is_the_root_of_a_trace_whatever_is_current(traced):
    with span("outer"):
        outer = trace_context()
        with span("elsewhere", {}):
            assert trace_context()["traceparent"].split("-")[1] not in str(outer)
        with span("inner", trace_carrier(trace_parent())):
            assert trace_context()["traceparent"].split("-")[1] in str(outer)


def test_without_a_collector_there_is_no_context_and_nothing_is_imported():
    code = (
        "import sys\n"
        "from asap_runtime.settings import TelemetrySettings\n"
        "from asap_runtime.telemetry import configure_traces, span, trace_context, trace_parent\n"
        "end = configure_traces(TelemetrySettings(), 'test')\n"
        "with span('x', n=1):\n    print(trace_context(), trace_parent())\n"
        "end()\n"
        "print([m for m in sys.modules if m.startswith('opentelemetry.sdk')])\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "{} None\n[]\n"


def test_a_claim_knows_how_long_it_was_due(tmp_path):
    url = f"sqlite:///{tmp_path}/asap.db"
    upgrade(url)
    database = Database(open_engine(url))
    submit(database, MemoryQueue(), 2)
    Platform(database).pass_time(1000)
    store = JobStore(database)
    [claim] = store.claim([1], "anchor", "me")
    assert 1000 <= claim.waited_s < 1500
    store.finish([Outcome.done(claim, claim.payload, "surprisal")])
    [moved] = store.claim([1], "surprisal", "me")
    assert 0 <= moved.waited_s < 500, "from the end of the stage before"
    transactions = REGISTRY.get_sample_value("asap_db_seconds_count", {"op": "write"})
    assert transactions >= 5
    database.close()


def test_lines_of_libraries_are_lines_of_ours_without_their_words(capsys):
    configure_logs(TelemetrySettings(log_json=True))
    try:
        raise ValueError("planted one")
    except ValueError:
        logging.getLogger("some.library").exception("It broke\nplanted %s", "two")
    logging.getLogger("some.library").info("planted three")
    [line] = capsys.readouterr().err.splitlines()
    told = json.loads(line)
    assert told["event"] == "library.logged"
    assert (told["logger"], told["said"], told["level"]) == ("some.library", "It broke", "error")
    assert told["error"] == "ValueError"
    assert "planted" not in line


def test_configuring_twice_logs_once(capsys):
    for _ in range(2):
        configure_logs(TelemetrySettings(log_json=True))
    logging.getLogger("some.library").warning("once")
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_log_line_names_its_trace(traced, capsys):
    configure_logs(TelemetrySettings(log_json=True))
    with span("work"):
        get_logger().info("item.left_stage")
    get_logger().info("item.left_stage")
    traced.finish()
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert bytes.fromhex(first["trace_id"]) == traced.named("work")[0].trace_id
    assert "trace_id" not in second
