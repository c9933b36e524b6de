"""Both stages: from a question to grades, resumed wherever they were broken off."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from sqlalchemy import select
from tokenizers import Tokenizer

from asap.errors import CapacityError, InvalidInput, UpstreamUnavailable
from asap.eval_config import EvalConfig
from asap.eval_items import EvalItem
from asap.metrics import results_of
from asap.payloads import read_payload
from asap.problems import ProblemRef
from asap.report import build_report
from asap_evaluator import stage as module
from asap_evaluator.isolation import Outcome
from asap_evaluator.sandbox import Sandbox
from asap_evaluator.settings import EvaluatorSettings
from asap_evaluator.stage import GenerateStage, GradeStage
from asap_runtime.blobs import BlobStore
from asap_runtime.health import Probed
from asap_runtime.host import open_database
from asap_runtime.stage import Done, Wait
from asap_runtime.tables import items
from asap_runtime.values import NewItem, unpack
from evaluator_problems import RIGHT, STDIN, asserts_problem
from fake_vllm import FakeVllm, Item, Request, Say, Status
from job_store import Platform
from waiting import until

JOB = "0" * 32
WRONG = "def add(a, b):\n    return a"
WORKER = """
import asyncio, sys
from asap_evaluator.settings import EvaluatorSettings
from asap_evaluator.stage import GenerateStage
from asap_runtime.blobs import open_blobs
from asap_runtime.host import StageHost, open_database
from asap_runtime.settings import load_settings

async def main():
    settings = load_settings(EvaluatorSettings)
    stage = GenerateStage(settings, blobs=open_blobs(settings))
    async with StageHost.open(settings, open_database(settings), [stage]):
        await asyncio.sleep(600)

asyncio.run(main())
"""


def answer(code: str, thinking: str = "so") -> str:
    return f"{thinking}</think>\n```python\n{code}\n```"


@dataclass(slots=True)
class ThinkingVllm(FakeVllm):
    """Answers each question as it always does: what a greedy model is."""

    answers: dict[str, str] = field(default_factory=dict)
    """By a text in the question."""
    tokenizer: Tokenizer | None = None

    def _item(self, request: Request) -> Item:
        if request.body["max_tokens"] == 1:
            return Say("warm")
        prompt = self.tokenizer.decode(request.body["prompt"], skip_special_tokens=False)
        [text] = [text for mark, text in self.answers.items() if mark in prompt]
        planned = FakeVllm._item(self, request)
        if isinstance(planned, Say):
            pieces = [f"{word} " for word in text.split(" ")]
            held = {"waits_after": planned.waits_after, "stops_after": planned.stops_after}
            return Say(*pieces, **held)
        return planned

    @property
    def budgets(self) -> list[int]:
        """Of the completions that were asked for, in order."""
        sent = [body["max_tokens"] for body in self.asked("/v1/completions")]
        return [budget for budget in sent if budget > 1]


@pytest.fixture
def server(tiny_model_dir):
    tokenizer = Tokenizer.from_file(str(tiny_model_dir / "tokenizer.json"))
    answers = {"ADD": answer(RIGHT), "SUB": answer(WRONG)}
    with ThinkingVllm(answers=answers, tokenizer=tokenizer) as server:
        yield server


@pytest.fixture
def blobs(tmp_path):
    return BlobStore.in_folder(tmp_path / "blobs")


@pytest.fixture
def own(server, tiny_model_dir, tmp_path):
    """The group of settings: a given server, and graders that a busy machine does not stop."""
    return {
        "base_url": f"{server.url}/v1",
        "served_model": server.model,
        "tokenizer": str(tiny_model_dir),
        "reference_cpu_s": 10.0,
        "grade_concurrency": 1,
    }


@pytest.fixture
async def generating(own, blobs, tmp_path):
    stage = GenerateStage(EvaluatorSettings(home=tmp_path, evaluator=own), blobs=blobs)
    await stage.start()
    yield stage
    await stage.stop()


@pytest.fixture
def opens_at_once(monkeypatch, namespaces):
    """The sandbox that was opened for the session; opening takes seconds."""
    monkeypatch.setattr(Sandbox, "open", classmethod(lambda cls, **_: namespaces))
    monkeypatch.setattr(Sandbox, "close", lambda self: None)
    return namespaces


@pytest.fixture
async def grading(own, blobs, tmp_path, opens_at_once):
    stage = GradeStage(EvaluatorSettings(home=tmp_path, evaluator=own), blobs=blobs)
    await stage.start()
    yield stage
    await stage.stop()


def item_of(mark: str = "ADD", *, config: dict | None = None, **fields: object) -> EvalItem:
    problem = asserts_problem(benchmark="own", task_id=mark, prompt=f"Please {mark}.")
    values = {"benchmarks": ("own",), "budgets": (4, 40), "template": "deepseek-r1"}
    values = {
        "id": JOB, "tenant": "t", "model": "m", "problems": (problem,),
        "config": EvalConfig(**{**values, **(config or {})}), **fields,
    }  # fmt: skip
    return EvalItem(**values)


async def through(stage, item: EvalItem) -> EvalItem:
    """Process until done, each payload read back as the runner does."""
    while True:
        result = await stage.process(item)
        item = read_payload(result.payload.model_dump_json().encode())
        if isinstance(result, Done):
            return item
        assert isinstance(result, Wait)
        assert result.seconds == 0


def verdicts(item: EvalItem) -> dict[tuple, str]:
    return {(g.budget, g.number, g.extraction): g.grade.verdict for g in item.grades}


async def test_a_question_is_asked_at_each_budget_and_every_sample_is_saved_at_once(
    generating, server
):
    await generating.ready()
    first = await generating.process(item_of())
    assert isinstance(first, Wait)
    assert [sample.budget for sample in first.payload.samples] == [4]
    second = await generating.process(first.payload)
    assert isinstance(second, Done)
    short, long = second.payload.samples
    assert short.truncated
    assert short.completion_tokens == 4
    assert not long.truncated
    assert long.text.split() == answer(RIGHT).split()
    assert server.budgets == [4, 40], "each budget for itself"


async def test_an_item_knows_the_engine_and_the_sandbox_it_met(generating, grading, namespaces):
    whole = await through(grading, await through(generating, item_of()))
    assert whole.sandbox == namespaces.facts
    assert {"level", "kernel", "python", "cpu_s", "memory_bytes"} <= whole.sandbox.keys()
    assert whole.engine == {"requests_at_once": "64", "window": "4096", "vllm": "0.0.fake"}


async def test_a_sample_that_is_there_is_not_generated_again(generating, server):
    whole = await through(generating, item_of())
    part = whole.grown(samples=whole.samples[1:])
    again = await through(generating, part)
    assert server.budgets == [4, 40, 4]
    assert again.samples[0] == whole.samples[1]
    assert isinstance(await generating.process(whole), Done)
    assert len(server.budgets) == 3


async def test_samples_of_a_budget_run_together_a_few_at_a_time(generating, server):
    server.script = [Say("x", waits_after=0)]
    item = item_of(config={"budgets": (40,), "samples": 10, "temperature": 0.6, "seed": 5})
    processing = asyncio.create_task(generating.process(item))
    await until(lambda: server.concurrent == module.SAMPLES_AT_ONCE)
    server.go.set()
    first = await processing
    assert len(first.payload.samples) == module.SAMPLES_AT_ONCE == server.max_concurrent
    done = await through(generating, first.payload)
    assert sorted(sample.number for sample in done.samples) == list(range(10))
    seeds = [body["seed"] for body in server.asked("/v1/completions") if body["max_tokens"] > 1]
    assert sorted(seeds) == list(range(5, 15))


async def test_what_came_through_beside_a_failure_is_kept(generating, server):
    server.script = [Say("x"), Status(500), Say("x")]
    item = item_of(config={"budgets": (40,), "samples": 3, "temperature": 0.6})
    first = await generating.process(item)
    assert isinstance(first, Wait)
    assert len(first.payload.samples) == 2
    server.script = [Status(500)]
    with pytest.raises(UpstreamUnavailable):
        await generating.process(first.payload)


async def test_a_cancelled_item_ends_its_generations(generating, server):
    server.script = [Say("x", stops_after=1)]
    item = item_of(config={"budgets": (40,), "samples": 3, "temperature": 0.6})
    working = asyncio.create_task(generating.process(item))
    await until(lambda: server.concurrent == 3)
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    await until(lambda: server.concurrent == 0)
    assert len(server.cancelled) == 3


async def test_a_killed_worker_loses_no_finished_task(server, own, tmp_path):
    """Three tasks of three budgets each, and a kill -9 when some samples are saved."""
    server.script = [*[Say("x")] * 4, Say("x", waits_after=0)]
    platform = Platform(open_database(EvaluatorSettings(home=tmp_path)))
    job = platform.intake.create_job("t", "evaluate", {}, 5)
    asked = [item_of(mark, config={"budgets": (6, 7, 8)}) for mark in ("ADD", "SUB", "ADD")]
    new = (
        NewItem(line, "generate", item.model_dump_json().encode())
        for line, item in enumerate(asked, 1)
    )
    platform.intake.add_items(job, new)
    platform.intake.mark_ingested(job)
    with worker(own, tmp_path) as process:
        await until(lambda: len(saved(platform)) == 4 and server.concurrent == 1)
        process.kill()
    before, requests = saved(platform), len(server.budgets)
    assert (len(before), requests) == (4, 5)
    server.go.set()
    platform.pass_time(600)  # its leases end
    with worker(own, tmp_path) as process:
        await until(lambda: len(saved(platform)) == 9)
        process.terminate()
    after = saved(platform)
    assert all(after[key] == sample for key, sample in before.items()), "not one is made again"
    assert len(server.budgets) - requests == 9 - len(before)
    platform.database.close()


def worker(own: dict, home: Path) -> subprocess.Popen:
    """A worker of the stage in a process of its own."""
    group = {"CONCURRENCY": "2", **{name.upper(): str(own[name]) for name in own}}
    environment = {f"ASAP_EVALUATOR__{name}": value for name, value in group.items()}
    return subprocess.Popen(
        [sys.executable, "-c", WORKER],
        env={"PATH": "/usr/bin:/bin", "ASAP_HOME": str(home), **environment},
        stdout=subprocess.DEVNULL,
    )


def saved(platform: Platform) -> dict[tuple, object]:
    """The samples in the database, by item, budget and number."""
    found = {}
    with platform.database.read() as connection:
        for id_, payload in connection.execute(select(items.c.id, items.c.payload)):
            item = read_payload(unpack(payload))
            found |= {(id_, s.budget, s.number): s for s in item.samples}
    return found


async def test_programs_are_graded_for_each_budget_extraction_and_benchmark(generating, grading):
    await grading.ready()
    plus = asserts_problem(
        benchmark="plus", task_id="ADD", prompt="Please ADD.",
        test="def check(candidate):\n    assert candidate(1, 1) == 0",
    )  # fmt: skip
    item = item_of()
    item = item.grown(problems=(*item.problems, plus))
    item = item.grown(config=item.config.model_copy(update={"benchmarks": ("own", "plus")}))
    done = await through(grading, await through(generating, item))
    found = {(g.benchmark, g.budget, g.extraction): g.grade.verdict for g in done.grades}
    assert found[("own", 40, "strict")] == found[("own", 40, "lenient")] == "passed"
    assert found[("plus", 40, "strict")] == "wrong"
    assert found[("own", 4, "strict")] == "no-code", "the thinking has not ended"
    assert len(found) == 8


async def test_each_distinct_program_runs_once(generating, grading, monkeypatch):
    item = item_of(config={"budgets": (40,), "samples": 4, "temperature": 0.6})
    item = await through(generating, item)
    seen = count_grades(grading, monkeypatch)
    done = await through(grading, item)
    assert len(done.grades) == 8
    assert len(seen) == 1, "four equal samples, and both extractions find the same code"


async def test_grades_are_saved_from_time_to_time_and_not_made_again(
    generating, grading, server, monkeypatch
):
    monkeypatch.setattr(module, "PROGRAMS_AT_ONCE", 1)
    seen = count_grades(grading, monkeypatch)
    item = await through(generating, item_of())
    first = await grading.process(item)
    assert isinstance(first, Wait)
    assert len(seen) == 1
    done = await through(grading, first.payload)
    assert len(seen) == len(set(seen))
    assert set(first.payload.grades) <= set(done.grades)
    assert isinstance(await grading.process(done), Done)
    assert len(seen) == len(set(seen))


async def test_a_problem_in_the_blob_store_is_that_which_was_asked(generating, grading, blobs):
    problem = STDIN.model_copy(update={"benchmark": "own", "prompt": "Please ADD."})
    reference = ProblemRef(
        benchmark="own", task_id="add", prompt="Please ADD.", sha256=problem.sha256, key="t/p.json"
    )
    item = await through(generating, item_of(problems=(reference,)))
    with blobs.create("t/p.json") as writer:
        writer.write(problem.model_dump_json().encode())
    done = await through(grading, item)
    assert verdicts(done)[40, 0, "strict"] == "wrong", "it defines a function and prints nothing"
    with blobs.create("t/p.json") as writer:
        writer.write(problem.model_copy(update={"prelude": "pass"}).model_dump_json().encode())
    with pytest.raises(InvalidInput, match="stored tests"):
        await grading.process(item)


async def test_the_configured_time_limit_stands_for_the_problems_own(
    generating, grading, monkeypatch
):
    limits = []

    async def grade(code, problem, *, add_imports):
        limits.append((problem.time_limit_s, add_imports))
        return await real(code, problem, add_imports=add_imports)

    real = grading._grader.grade
    monkeypatch.setattr(grading._grader, "grade", grade)
    for config in ({}, {"time_limit_s": 2.5, "add_imports": False}):
        item = item_of(config={"budgets": (40,), **config})
        await through(grading, await through(generating, item))
    assert limits == [(1.0, True), (2.5, False)]


async def test_where_no_sandbox_holds_items_wait_and_it_is_tried_again(
    own, blobs, tmp_path, monkeypatch, namespaces
):
    tries = []

    def refuse(**_):
        tries.append(1)
        raise CapacityError("no sandbox holds here", code="sandbox-unavailable")

    monkeypatch.setattr(Sandbox, "open", refuse)
    stage = GradeStage(EvaluatorSettings(home=tmp_path, evaluator=own), blobs=blobs)
    await stage.start()
    for call in (stage.ready, lambda: stage.process(item_of())):
        with pytest.raises(CapacityError) as caught:
            await call()
        assert caught.value.problem_code == "sandbox-unavailable"
    assert len(tries) == 1
    assert REGISTRY.get_sample_value("asap_sandbox_level") == 0
    monkeypatch.setattr(module, "REOPEN_S", 0.0)
    monkeypatch.setattr(Sandbox, "open", lambda **_: namespaces)
    monkeypatch.setattr(Sandbox, "close", lambda self: None)
    assert isinstance(await stage.process(item_of()), Done)
    await stage.ready()
    assert REGISTRY.get_sample_value("asap_sandbox_level") == 2
    await stage.stop()


async def test_trouble_of_the_sandbox_scores_nothing(generating, grading, monkeypatch):
    item = await through(generating, item_of(config={"budgets": (40,)}))
    before = trouble()

    def broken(self, programs, limits):
        for fd in (fd for program in programs for fd in program.pipes):
            os.close(fd)
        return [
            Outcome(None, None, b"", b"", b"", 0.1, 0.0, 0, trouble="no sandbox") for _ in programs
        ]

    monkeypatch.setattr(Sandbox, "run", broken)
    done = await through(grading, item)
    assert set(verdicts(done).values()) == {"sandbox-trouble"}
    assert not any(result.scored for result in results_of(done))
    assert trouble() == before + 1


def trouble() -> float:
    name, labels = "asap_sandbox_trouble_total", {"reason": "unscored"}
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def test_order_and_interruptions_change_no_score(generating, grading):
    """The same questions straight on, and shuffled, with half of the samples there already, and
    with the grades of some of them.
    """
    marks = ["ADD", "SUB"]
    config = {"budgets": (4, 40), "extractions": ("strict", "lenient")}
    straight = [
        await through(grading, await through(generating, item_of(mark, config=config)))
        for mark in marks
    ]
    resumed = []
    for mark, whole in random.sample(list(zip(marks, straight, strict=True)), 2):
        kept = whole.samples[1:]
        grades = [g for g in whole.grades if g.budget == kept[0].budget][:1]
        start = item_of(mark, config=config, samples=kept, grades=grades)
        resumed.append(await through(grading, await through(generating, start)))
    first, second = (scores(items) for items in (straight, resumed))
    assert first == second
    assert {row[-1] for row in first} == {0.0, 50.0}, "some pass and some do not"


def scores(items: list[EvalItem]) -> list[tuple]:
    """The rows of the report without times."""
    report = build_report({"m": [r for item in items for r in results_of(item)]})
    return [
        (
            r.benchmark,
            r.budget,
            r.extraction,
            r.samples,
            r.tokens,
            r.truncated,
            r.no_code,
            r.accuracy,
        )
        for r in report.rows
    ]


def test_stages_can_be_asked_whether_they_are_ready(own, blobs, tmp_path):
    settings = EvaluatorSettings(home=tmp_path, evaluator=own)
    for stage in (GenerateStage(settings, blobs=blobs), GradeStage(settings, blobs=blobs)):
        assert isinstance(stage, Probed)
        assert stage.concurrency >= 1


def count_grades(stage: GradeStage, monkeypatch) -> list[str | None]:
    seen: list[str | None] = []
    real = stage._grader.grade

    async def grade(code, problem, *, add_imports):
        seen.append(code)
        return await real(code, problem, add_imports=add_imports)

    monkeypatch.setattr(stage._grader, "grade", grade)
    return seen
