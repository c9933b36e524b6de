"""The report of an evaluation, and several side by side."""

from __future__ import annotations

import pytest

from asap.report import Report
from asap_gateway.auth import LOCAL, Principal
from evaluation_stages import submit, until, until_done

NO_JOB = "0" * 32


@pytest.fixture
async def pair(client):
    """Two ended evaluations: `short` solves what `slow` does not, and needs half of the tokens."""
    slow = await submit(client)
    await until(client, slow, "done")
    client.evaluator.wrong = set()
    short = await submit(client, model="short")
    await until(client, short, "done")
    return short, slow


async def report_of(client, path, **params):
    answer = await client.get(path, params=params)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    return Report.model_validate_json(answer.text)


async def test_the_report_of_one_evaluation(client):
    job = await submit(client)
    await until(client, job, "done")
    report = await report_of(client, f"/jobs/{job}/report")
    assert (report.models, report.candidate, report.comparisons) == (("slow",), None, ())
    rows = {(r.benchmark, r.budget, r.extraction): r for r in report.rows}
    assert len(rows) == 8
    row = rows["humaneval", 128, "lenient"]
    assert (row.tasks, row.passed, row.accuracy, row.tokens) == (4, 3, 75.0, 111.0)
    told = report.provenance["slow"]
    assert (told["job"], told["phase"], told["config"]["budgets"]) == (job, "done", [64, 128])
    assert set(told["data"]) == {"humaneval", "humaneval-plus"}
    assert told["engines"] == [{"vllm": "0"}]
    assert told["sandboxes"] == [{"level": "scripted"}]
    assert "SECRET" not in report.to_json()
    assert "slow, humaneval at 64 tokens, strict: 4 of 164 tasks are scored" in report.incomplete


async def test_it_comes_as_markdown_too(client, pair):
    short, slow = pair
    for path, params in (
        (f"/jobs/{slow}/report", {"format": "markdown"}),
        ("/reports/compare", {"format": "markdown", "job": [short, slow]}),
    ):
        answer = await client.get(path, params=params)
        assert answer.headers["content-type"] == "text/markdown; charset=utf-8"
        assert answer.text.startswith("# Evaluation\n")
        assert "| slow | 128 | strict | 4 | 3 | 75.00 |" in answer.text
    assert "short against the others" in answer.text


async def test_while_it_runs_there_is_a_partial_one_alone(client):
    client.evaluator.go.clear()
    job = await submit(client)
    await until_done(client, job, 3)
    answer = await client.get(f"/jobs/{job}/report")
    assert (answer.status_code, answer.json()["code"]) == (409, "results-not-ready")
    partial = await report_of(client, f"/jobs/{job}/report", partial=True)
    assert {row.tasks for row in partial.rows} == {2}
    client.evaluator.go.set()
    await until(client, job, "done")
    for params in ({}, {"partial": True}):
        whole = await report_of(client, f"/jobs/{job}/report", **params)
        assert {row.tasks for row in whole.rows} == {4, 2}


async def test_before_any_question_is_done_the_report_says_so(client):
    client.evaluator.go.clear()
    job = await submit(client, config={"benchmarks": ["mine"]})
    await until(client, job, "queued", "running")
    partial = await report_of(client, f"/jobs/{job}/report", partial=True)
    assert (partial.rows, partial.incomplete) == ((), ("mine: no task is done",))


async def test_jobs_stand_side_by_side_with_paired_tests(client, pair):
    short, slow = pair
    report = await report_of(client, "/reports/compare", job=[short, slow])
    assert (report.candidate, report.models) == ("short", ("slow", "short"))
    [at] = [c for c in report.comparisons if (c.benchmark, c.budget) == ("humaneval", 128)
            and c.extraction == "strict"]  # fmt: skip
    assert (at.baseline, at.tasks, at.both, at.only_candidate, at.only_baseline) == (
        "slow", 4, 3, 1, 0,
    )  # fmt: skip
    assert at.kept_ratio == pytest.approx((50 + 11) / (100 + 11))
    assert {d.task_id for d in report.differences} == {"HumanEval/2"}
    turned = await report_of(client, "/reports/compare", job=[slow, short])
    assert turned.candidate == "slow"


async def test_the_same_model_twice_is_told_apart_by_the_job(client, pair):
    _, slow = pair
    again = await submit(client)
    await until(client, again, "done")
    report = await report_of(client, "/reports/compare", job=[again, slow])
    assert set(report.models) == {f"slow ({job[:8]})" for job in (again, slow)}
    assert {report.provenance[name]["job"] for name in report.models} == {again, slow}


async def test_other_data_under_the_same_name_is_said(client, pair, tmp_path):
    short, slow = pair
    with (tmp_path / "benchmarks" / "HumanEvalPlus.jsonl").open("a") as stream:
        stream.write(
            "\n".join([(tmp_path / "benchmarks" / "mine.jsonl").read_text().split("\n")[1]])
        )
    other = await submit(client)
    await until(client, other, "done")
    [doubt] = [
        line
        for line in (await report_of(client, "/reports/compare", job=[other, short])).incomplete
        if "different data" in line
    ]
    assert doubt.startswith("humaneval-plus: ")
    whole = await report_of(client, "/reports/compare", job=[short, slow])
    assert not [line for line in whole.incomplete if "different data" in line]


async def test_a_report_is_of_an_evaluation_alone(client):
    triple = {"question": "q", "cot": "a\n\nb", "answer": "x"}
    prune = (await client.post("/jobs", json={"triples": [triple]})).json()["id"]
    ended = await submit(client)
    await until(client, ended, "done")
    for path, params in (
        (f"/jobs/{prune}/report", {}),
        (f"/jobs/{prune}/report", {"partial": True}),
        ("/reports/compare", {"job": [ended, prune]}),
    ):
        answer = await client.get(path, params=params)
        assert (answer.status_code, "of the kind prune" in answer.text) == (422, True), path
    gone = await client.get("/reports/compare", params={"job": [ended, NO_JOB]})
    assert (gone.status_code, gone.json()["code"]) == (404, "not-found")


async def test_a_rejected_job_has_no_report(client, tmp_path):
    (tmp_path / "benchmarks" / "broken.jsonl").write_text("[]\n")
    job = await submit(client, config={"benchmarks": ["broken"]})
    state = await until(client, job, "rejected")
    assert state["evaluation"] is None
    answer = await client.get(f"/jobs/{job}/report")
    assert (answer.status_code, answer.json()["code"]) == (409, "results-not-ready")


@pytest.mark.parametrize(
    ("params", "pointer"),
    [
        ({}, "/job"),
        ({"job": [NO_JOB]}, "/job"),
        ({"job": [f"{n:032x}" for n in range(9)]}, "/job"),
        ({"job": [NO_JOB, NO_JOB]}, "/job"),
        ({"job": [NO_JOB, "x"]}, "/job/1"),
        ({"job": [NO_JOB, "1" * 32], "format": "html"}, "/format"),
    ],
)
async def test_what_cannot_be_compared_is_refused(client, params, pointer):
    answer = await client.get("/reports/compare", params=params)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"] == pointer


async def test_another_tenants_evaluation_does_not_exist(client, pair, monkeypatch):
    short, slow = pair
    assert LOCAL.tenant == "local"
    monkeypatch.setattr("asap_gateway.auth.LOCAL", Principal("b", "b", "admin"))
    for path, params in (
        (f"/jobs/{short}/report", {}),
        (f"/jobs/{short}/report", {"partial": True}),
        ("/reports/compare", {"job": [short, slow]}),
    ):
        answer = await client.get(path, params=params)
        assert (answer.status_code, answer.json()["code"]) == (404, "not-found"), path
