"""The questions of an evaluation are read from the server's benchmarks, on every database."""

from __future__ import annotations

import json

import pytest
from sqlalchemy import select

from asap.errors import UpstreamUnavailable
from asap.eval_config import EvalConfig
from asap.payloads import read_payload
from asap.problems import Problem, ProblemRef
from asap_runtime.benchmarks import BenchmarkFolder
from asap_runtime.blobs import BlobStore
from asap_runtime.ingest import Ingester, IntakeLimits
from asap_runtime.intake import StoredEvaluation
from asap_runtime.tables import items
from asap_runtime.takings import Takings
from asap_runtime.values import unpack
from evaluation_stages import human_eval, write_benchmarks
from job_store import TENANT

SERVED = StoredEvaluation("org/model", None, None)
MANY = [str(n) for n in range(1200)]


@pytest.fixture
def folder(tmp_path):
    return write_benchmarks(tmp_path / "benchmarks")


@pytest.fixture
def blobs(tmp_path):
    return BlobStore.in_folder(tmp_path / "blobs")


@pytest.fixture
def announced():
    return []


@pytest.fixture
def ingester_on(platform, blobs, folder, announced):
    def make(**options):
        given = {"benchmarks": BenchmarkFolder(folder), **options}
        limits = given.pop("limits", IntakeLimits())
        store = given.pop("blobs", blobs)
        return Ingester(platform.database, store, limits, announced.append, **given)

    return make


@pytest.fixture
def evaluation(platform):
    def submit(source=SERVED, tenant=TENANT, **config):
        values = EvalConfig(**config).model_dump(mode="json")
        return platform.intake.create_job(tenant, "evaluate", values, 5, source=source)

    return submit


def items_of(platform, job_id):
    """The name and the payload of each item, all of which wait for their first stage."""
    columns = (items.c.custom_id, items.c.stage, items.c.payload)
    rows = select(*columns).where(items.c.job_id == job_id).order_by(items.c.position)
    with platform.database.read() as connection:
        found = connection.execute(rows).all()
    assert {stage for _, stage, _ in found} <= {"generate"}
    return [(name, read_payload(unpack(payload))) for name, _, payload in found]


def asked(found):
    return [[(p.benchmark, p.task_id) for p in item.problems] for _, item in found]


def test_each_question_is_one_item_in_the_order_of_the_benchmarks(
    platform, evaluation, ingester_on, announced
):
    job_id = evaluation()
    assert platform.phase(job_id) == "validating"
    assert ingester_on().take_in()
    assert announced == [job_id]
    assert platform.phase(job_id) == "queued"
    found = items_of(platform, job_id)
    assert asked(found) == [
        [("humaneval", "HumanEval/0"), ("humaneval-plus", "HumanEval/0")],
        [("humaneval", "HumanEval/1")],
        [("humaneval", "HumanEval/2")],
        [("humaneval", "HumanEval/3")],
        [("humaneval-plus", "HumanEval/1")],
    ]
    assert [name for name, _ in found] == [
        *(f"HumanEval/{n}" for n in range(4)),
        "humaneval-plus:HumanEval/1",
    ]
    _, first = found[0]
    assert (first.id, first.tenant, first.model) == (job_id, TENANT, "org/model")
    assert first.config == EvalConfig()
    assert {name: data.tasks for name, data in first.data.items()} == {
        "humaneval": 4,
        "humaneval-plus": 2,
    }
    assert len({data.sha256 for data in first.data.values()}) == 2
    assert all(item.data == first.data for _, item in found)


def test_questions_with_other_budgets_are_asked_apart(platform, folder, evaluation, ingester_on):
    (folder / "own.jsonl").write_text(json.dumps(human_eval("HumanEval/0")))
    shared = evaluation(benchmarks=["humaneval", "own"], limit=1, budgets=[64])
    apart = evaluation(benchmarks=["humaneval", "own"], limit=1)
    ingester = ingester_on()
    assert ingester.take_in()
    assert ingester.take_in()
    assert [len(group) for group in asked(items_of(platform, shared))] == [2]
    own = items_of(platform, apart)
    assert [item.budgets for _, item in own] == [(6144,), (10240,)]


def test_a_benchmark_may_ask_one_question_twice(platform, folder, evaluation, ingester_on):
    twice = [human_eval(task, "def f():\n") for task in ("a", "b")]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in twice))
    job_id = evaluation(benchmarks=["own"])
    ingester_on().take_in()
    assert asked(items_of(platform, job_id)) == [[("own", "a")], [("own", "b")]]


def test_the_limit_is_of_each_benchmark(platform, evaluation, ingester_on):
    job_id = evaluation(limit=1, benchmarks=["mine", "humaneval"])
    ingester_on().take_in()
    found = items_of(platform, job_id)
    assert [name for name, _ in found] == ["large", "HumanEval/0"]
    assert {name: data.tasks for name, data in found[0][1].data.items()} == {
        "mine": 1,
        "humaneval": 1,
    }


def test_a_large_problem_lies_in_the_store_once_for_each_tenant(
    platform, blobs, evaluation, ingester_on
):
    jobs = [evaluation(benchmarks=["mine"]) for _ in range(2)]
    theirs = evaluation(benchmarks=["mine"], tenant="b")
    ingester = ingester_on()
    while ingester.take_in():
        pass
    (_, large), (_, small) = items_of(platform, jobs[0])
    [ref], [inline] = large.problems, small.problems
    assert (type(ref), type(inline)) == (ProblemRef, Problem)
    assert ref.key == f"{TENANT}/problems/{ref.sha256}.json"
    problem = Problem.model_validate_json(blobs.open(ref.key).read())
    assert (problem.sha256, problem.prompt, len(problem.test) > 300_000) == (
        ref.sha256, ref.prompt, True,
    )  # fmt: skip
    assert blobs.keys_below(TENANT) == [ref.key]
    [_, payload] = items_of(platform, theirs)[0]
    assert payload.problems[0].key == f"b/problems/{ref.sha256}.json"
    assert len(large.model_dump_json()) < 10_000


def test_a_registered_model_is_named_with_its_files(platform, evaluation, ingester_on):
    source = StoredEvaluation("coder@3", f"{TENANT}/runs/x/model", "1" * 64)
    job_id = evaluation(source, benchmarks=["humaneval"])
    ingester_on().take_in()
    for _, item in items_of(platform, job_id):
        assert (item.model, item.model_prefix, item.model_sha256) == (
            "coder@3", f"{TENANT}/runs/x/model", "1" * 64,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "options", "code"),
    [
        ({"benchmarks": ["leetcode"]}, {}, "invalid-input"),
        ({"benchmarks": ["humaneval", "gone"]}, {}, "invalid-input"),
        ({"benchmarks": ["../benchmarks/mine"]}, {}, "invalid-input"),
        ({"benchmarks": ["broken"]}, {}, "invalid-input"),
        ({"benchmarks": ["empty"]}, {}, "not-found"),
        ({}, {"benchmarks": None}, "invalid-input"),
        ({"benchmarks": ["humaneval"]}, {"limits": IntakeLimits(max_items=3)}, "too-many-items"),
    ],
)
def test_what_cannot_be_asked_rejects_the_job(
    platform, folder, evaluation, ingester_on, announced, config, options, code
):
    (folder / "broken.jsonl").write_text('{"question": "?"}\n')
    (folder / "empty.jsonl").write_text("")
    job_id = evaluation(**config)
    assert ingester_on(**options).take_in()
    view = platform.ledger.job(TENANT, job_id)
    assert (view.phase, [problem.code for problem in view.problems]) == ("rejected", [code])
    assert str(folder) not in view.problems[0].detail
    assert announced == []
    assert platform.claim(stage="generate") == []


@pytest.fixture
def many(folder):
    rows = [human_eval(task) for task in MANY]
    (folder / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "many"


def interrupt(ingester, event):
    """Something happens after the first batch is in."""
    add = ingester._takings.add

    def noted(taking, batch):
        add(taking, batch)
        ingester._takings.add = add
        event()

    ingester._takings.add = noted
    return ingester


@pytest.mark.parametrize("way", ["stopped", "killed"])
def test_who_goes_on_adds_what_is_missing(platform, evaluation, ingester_on, announced, many, way):
    def killed():
        raise UpstreamUnavailable("the database is away", code="database-unavailable")

    job_id = evaluation(benchmarks=[many])
    leaving = ingester_on()
    event = leaving._stopping.set if way == "stopped" else killed
    assert interrupt(leaving, event).take_in()
    assert len(platform.ledger.items(TENANT, job_id, limit=10_000)) == 500
    assert platform.phase(job_id) == "validating"
    if way == "killed":
        assert not ingester_on().take_in(), "the lease is held"
        platform.pass_time(61)
    assert ingester_on().take_in()
    assert announced == [job_id]
    found = items_of(platform, job_id)
    assert [name for name, _ in found] == MANY
    assert [item.problems[0].task_id for _, item in found] == MANY


def test_a_file_that_changed_meanwhile_rejects_the_job(
    platform, folder, evaluation, ingester_on, many
):
    job_id = evaluation(benchmarks=[many])
    leaving = ingester_on()
    interrupt(leaving, leaving._stopping.set).take_in()
    with (folder / "many.jsonl").open("a") as stream:
        stream.write(json.dumps(human_eval("one more")) + "\n")
    assert ingester_on().take_in()
    view = platform.ledger.job(TENANT, job_id)
    assert (view.phase, "has changed" in view.problems[0].detail) == ("rejected", True)
    assert platform.claim(stage="generate") == []


def test_the_lease_is_kept_while_files_are_read_and_problems_written(
    platform, folder, evaluation, ingester_on, announced
):
    rows = [human_eval(task, padding=270_000) for task in MANY[:20]]
    (folder / "heavy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation(benchmarks=["heavy"])
    ingester = ingester_on()
    ingester._beat_s = 0.0  # at each word
    leases, others = [], []
    keep = ingester._takings.keep

    def noted(taking):
        keep(taking)
        leases.append(taking.lease)
        others.append(Takings(platform.database).take())

    ingester._takings.keep = noted
    assert ingester.take_in()
    assert len(leases) > 2 * len(rows), "for each line, and for each problem"
    assert leases == sorted(leases)
    assert set(others) == {None}
    assert announced


@pytest.mark.parametrize("stop", ["cancel", "delete"])
def test_a_stopped_job_ends_the_reading(platform, evaluation, ingester_on, announced, many, stop):
    job_id = evaluation(benchmarks=[many])
    ingester = ingester_on()
    interrupt(ingester, lambda: getattr(platform.ledger, stop)(TENANT, job_id)).take_in()
    assert announced == []
    assert platform.claim(stage="generate") == []
    assert not ingester_on().take_in()
