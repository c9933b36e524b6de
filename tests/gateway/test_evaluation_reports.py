"""What is kept of a report, and what the registry learns from it."""

from __future__ import annotations

import threading

import pytest
from structlog.testing import capture_logs

from asap.errors import Overloaded
from asap_gateway.evaluation_reports import figure_key
from evaluation_stages import submit, until
from job_store import a_model
from waiting import until as until_true


@pytest.fixture
def model(client):
    a_model(client.registry, "coder", "1" * 32, "local")
    return lambda: client.registry.get("local", "coder").meta


@pytest.fixture
def reports(client):
    return client.app.state.gateway.reports


async def test_the_figures_go_to_the_models_meta(client, model):
    before = model()
    job = await submit(client, model="coder")
    await until(client, job, "done")
    added = {key: value for key, value in model().items() if key not in before}
    assert set(added) == {
        figure_key(name, budget) for name in ("humaneval", "humaneval-plus") for budget in (64, 128)
    }
    figure = added[figure_key("humaneval", 128)]
    assert (figure["pass_at_1"], figure["tokens"], figure["tasks"]) == (75.0, 61.0, 4)
    assert (figure["extraction"], figure["job"]) == ("strict", job)
    assert (await client.get("/models/coder/1")).json()["meta"][figure_key("humaneval", 64)]


async def test_a_smaller_evaluation_does_not_take_the_place_of_a_larger_one(client, model):
    whole = await submit(
        client, model="coder", config={"benchmarks": ["humaneval"], "budgets": [8]}
    )
    await until(client, whole, "done")
    part = {"benchmarks": ["humaneval"], "budgets": [8], "limit": 2}
    await until(client, await submit(client, model="coder", config=part), "done")
    key = figure_key("humaneval", 8)
    assert model()[key]["job"] == whole
    newer = await submit(
        client, model="coder", config={"benchmarks": ["humaneval"], "budgets": [8]}
    )
    await until(client, newer, "done")
    assert model()[key]["job"] == newer


async def test_an_older_report_does_not_take_the_place_of_a_newer_one(client, model, reports):
    older = await submit(client, model="coder")
    await until(client, older, "done")
    newer = await submit(client, model="coder")
    await until(client, newer, "done")
    reports._kept.clear()  # as after a restart
    await client.get(f"/jobs/{older}/report")
    assert model()[figure_key("humaneval", 64)]["job"] == newer


async def test_what_is_not_whole_teaches_nothing(client, model):
    before = model()
    client.evaluator.broken = {"HumanEval/3"}
    failed = await submit(client, model="coder", config={"benchmarks": ["humaneval"]})
    await until(client, failed, "done")
    client.evaluator.broken = set()
    client.evaluator.go.clear()
    cancelled = await submit(client, model="coder", config={"benchmarks": ["humaneval-plus"]})
    assert (await client.get(f"/jobs/{cancelled}/report", params={"partial": True})).is_success
    await client.post(f"/jobs/{cancelled}/cancel")
    await until(client, cancelled, "cancelled")
    assert (await client.get(f"/jobs/{cancelled}/report")).is_success
    assert model() == before


async def test_a_model_that_was_removed_is_no_trouble(client, model):
    client.evaluator.go.clear()
    job = await submit(client, model="coder")
    client.registry.remove("local", "coder", 1)
    client.evaluator.go.set()
    state = await until(client, job, "done")
    assert len(state["evaluation"]["figures"]) == 8


async def test_the_report_of_an_ended_job_is_made_once(client, reports):
    job = await submit(client)
    await until(client, job, "done")
    first = reports.report("local", job)
    assert reports.report("local", job) is first
    assert reports.report("local", job, partial=True) is first


async def test_few_reports_are_made_at_a_time(client, reports):
    job = await submit(client)
    other = await submit(client, model="other")
    for one in (job, other):
        await until(client, one, "done")
    await until_true(lambda: not reports._making)  # figures are there a moment before it ends
    reports._kept.clear()
    with reports._slot(), reports._slot():
        for path, params in (
            (f"/jobs/{job}/report", {}),
            ("/reports/compare", {"job": [job, other]}),
        ):
            answer = await client.get(path, params=params)
            assert (answer.status_code, answer.json()["code"]) == (429, "overloaded")
            assert int(answer.headers["retry-after"]) >= 1
        state = (await client.get(f"/jobs/{job}")).json()
        assert (state["phase"], state["evaluation"]["figures"]) == ("done", None)
        with pytest.raises(Overloaded):
            reports.report("local", job)
        await until_true(lambda: not reports._making)
    assert (await client.get(f"/jobs/{job}/report")).is_success
    assert (await client.get(f"/jobs/{job}")).json()["evaluation"]["figures"]


async def test_a_look_at_an_ended_job_has_its_report_made_once(client, reports, monkeypatch):
    job = await submit(client)
    await until(client, job, "done")
    reports._kept.clear()
    made, inner = [], reports._whole
    go = threading.Event()

    def held_up(tenant, view):
        made.append(view.id)
        go.wait()
        return inner(tenant, view)

    monkeypatch.setattr(reports, "_whole", held_up)
    for _ in range(5):
        state = (await client.get(f"/jobs/{job}")).json()
        assert state["evaluation"]["figures"] is None
    go.set()
    await until(client, job, "done")
    assert made == [job]


async def test_a_report_that_cannot_be_made_is_logged_and_tried_again(client, reports, monkeypatch):
    job = await submit(client)
    await until(client, job, "done")
    reports._kept.clear()
    inner, failures = reports._whole, [ValueError("SECRET"), Overloaded("busy")]

    def failing(tenant, view):
        if failures:
            raise failures.pop()
        return inner(tenant, view)

    monkeypatch.setattr(reports, "_whole", failing)
    with capture_logs() as logs:
        assert (await until(client, job, "done"))["evaluation"]["figures"]
    told = [(entry["event"], entry["job_id"]) for entry in logs if "report" in entry["event"]]
    assert told == [("report.not_made", job), ("report.crashed", job)]
