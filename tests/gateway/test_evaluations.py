"""An evaluation through the doors of the gateway; a script answers and grades."""

from __future__ import annotations

import json

import pytest

from asap.eval_items import EvalItem
from evaluation_stages import EVALUATE, submit, until, until_done
from job_store import a_model

NAMES = ["HumanEval/0", "HumanEval/1", "HumanEval/2", "HumanEval/3", "humaneval-plus:HumanEval/1"]


async def test_a_model_is_asked_and_graded(client):
    job = await submit(client)
    state = await until(client, job, "done")
    assert (state["kind"], state["total"]) == ("evaluate", 5)
    assert state["counts"] == [{"stage": "grade", "status": "succeeded", "items": 5}]
    assert state["config"]["budgets"] == [64, 128]
    assert state["config"]["benchmarks"] == ["humaneval", "humaneval-plus"]
    told = state["evaluation"]
    assert (told["model"], told["model_sha256"]) == ("slow", None)
    assert (told["questions"], told["generated"], told["done"]) == (5, 5, 5)
    assert {name: data["tasks"] for name, data in told["benchmarks"].items()} == {
        "humaneval": 4,
        "humaneval-plus": 2,
    }
    figures = {(f["benchmark"], f["budget"], f["extraction"]): f for f in told["figures"]}
    assert len(figures) == 8
    assert figures["humaneval", 64, "strict"] == {
        "benchmark": "humaneval", "budget": 64, "extraction": "strict", "tasks": 4,
        "pass_at_1": 75.0, "tokens": 64.0,
    }  # fmt: skip
    assert figures["humaneval", 128, "strict"]["tokens"] == 100 + len("HumanEval/0")
    assert figures["humaneval-plus", 64, "lenient"]["pass_at_1"] == 100.0
    listed = (await client.get("/jobs")).json()["jobs"]
    assert [(body["id"], body["evaluation"]) for body in listed] == [(job, None)]


async def test_its_result_are_the_items_in_the_order_of_the_questions(client):
    job = await submit(client, config={"budgets": [64, 128], "samples": 2, "temperature": 0.5})
    await until(client, job, "done")
    answer = await client.get(f"/jobs/{job}/result")
    assert answer.headers["content-type"] == "application/x-ndjson"
    items = [EvalItem.model_validate_json(line) for line in answer.text.splitlines()]
    assert [item.problems[0].task_id for item in items] == [
        *(f"HumanEval/{n}" for n in range(4)),
        "HumanEval/1",
    ]
    assert [(s.budget, s.number) for s in items[0].samples] == [
        (64, 0), (64, 1), (128, 0), (128, 1),
    ]  # fmt: skip
    assert len(items[0].grades) == 4 * 2 * 2, "samples, benchmarks, extractions"
    rows = (await client.get(f"/jobs/{job}/items")).json()["items"]
    assert [row["custom_id"] for row in rows] == NAMES
    for params in ({"layout": "messages"}, {"format": "parquet"}):
        answer = await client.get(f"/jobs/{job}/result", params=params)
        assert (answer.status_code, answer.json()["code"]) == (406, "not-acceptable"), params


async def test_while_it_runs_it_says_how_far_it_is(client):
    client.evaluator.go.clear()
    job = await submit(client)
    state = await until_done(client, job, 3)
    told = state["evaluation"]
    assert (told["questions"], told["generated"], told["figures"]) == (5, 3, None)
    assert state["finished_at"] is None
    client.evaluator.go.set()
    assert (await until(client, job, "done"))["evaluation"]["figures"]


async def test_events_tell_how_far_it_is(client):
    job = await submit(client)
    text = (await client.get(f"/jobs/{job}/events")).text
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert text.count("event: end") == 1
    told = json.loads(data[-1])["evaluation"]
    assert (told["questions"], told["done"], told["model"]) == (5, 5, "slow")


async def test_what_failed_is_said_and_asked_again_on_retry(client):
    client.evaluator.broken = {"HumanEval/3"}
    job = await submit(client)
    state = await until(client, job, "done")
    assert [(e["code"], e["items"]) for e in state["error_summary"]] == [("upstream-invalid", 1)]
    assert {f["tasks"] for f in state["evaluation"]["figures"]} == {3, 2}
    client.evaluator.broken = set()
    assert (await client.post(f"/jobs/{job}/retry")).status_code == 200
    state = await until(client, job, "done")
    assert state["counts"] == [{"stage": "grade", "status": "succeeded", "items": 5}]
    assert {f["tasks"] for f in state["evaluation"]["figures"]} == {4, 2}


async def test_cancelling_ends_it_and_what_is_done_stays(client):
    client.evaluator.go.clear()
    job = await submit(client)
    await until_done(client, job, 3)
    await client.post(f"/jobs/{job}/cancel")
    state = await until(client, job, "cancelled")
    assert len((await client.get(f"/jobs/{job}/result")).text.splitlines()) == 3
    assert {f["tasks"] for f in state["evaluation"]["figures"]} == {2}
    assert (await client.delete(f"/jobs/{job}")).status_code == 204
    assert (await client.get(f"/jobs/{job}")).status_code == 404


async def test_a_registered_model_is_pinned_when_the_job_is_made(client):
    first, second = (a_model(client.registry, "coder", f"{n:032x}", "local") for n in (1, 2))
    a_model(client.registry, "theirs", f"{3:032x}", "b")
    for name, expected in (
        ("coder", "coder@2"),
        ("coder@1", "coder@1"),
        ("theirs", "theirs"),
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B"),
    ):
        job = await submit(client, model=name)
        told = (await until(client, job, "done"))["evaluation"]
        assert (told["model"], told["model_sha256"]) == (
            expected,
            "0" * 64 if "@" in expected else None,
        )
    line = (await client.get(f"/jobs/{job}/result")).text.splitlines()[0]
    assert json.loads(line)["model_prefix"] is None
    client.registry.set_stage("local", "coder", 1, "production")
    job = await submit(client, model="coder")
    await until(client, job, "done")
    item = json.loads((await client.get(f"/jobs/{job}/result")).text.splitlines()[0])
    assert (item["model"], item["model_prefix"]) == (first.reference, first.prefix)
    assert second.reference == "coder@2"


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"model": "coder@7"}, "/model"),
        ({"model": "coder@0"}, "/model"),
        ({"model": ""}, "/model"),
        ({"model": "--help"}, "/model"),
        ({"model": "../secret"}, "/model"),
        ({"model": "/etc/passwd"}, "/model"),
        ({"model": "a/b/c"}, "/model"),
        ({"model": "http://x"}, "/model"),
        ({"model": "a\nb"}, "/model"),
        ({"model": "a\n"}, "/model"),
        ({"model": "x" * 257}, "/model"),
        ({"config": {"benchmarks": ["leetcode"]}}, "/config/benchmarks/0"),
        ({"config": {"benchmarks": ["mine", "gone"]}}, "/config/benchmarks/1"),
        ({"config": {"benchmarks": ["../mine"]}}, "/config/benchmarks/0"),
        ({"config": {"benchmarks": ["openai/openai_humaneval@x"]}}, "/config/benchmarks/0"),
        ({"config": {"benchmarks": ["https://example.org/x.jsonl"]}}, "/config/benchmarks/0"),
        ({"config": {"benchmarks": []}}, "/config/benchmarks"),
        ({"config": {"benchmarks": ["mine", "mine"]}}, "/config"),
        ({"config": {"budgets": [0]}}, "/config/budgets/0"),
        ({"config": {"samples": 2}}, "/config"),
        ({"config": {"samples": 501, "temperature": 1, "budgets": [8, 9]}}, "/config/samples"),
        ({"config": {"extraction": "strict"}}, "/config/extraction"),
        ({"cost_cap_usd": 1}, "/cost_cap_usd"),
        ({"dataset": "file:///x.jsonl"}, "/dataset"),
        ({"job": "0" * 32}, "/job"),
        ({"webhook": "http://127.0.0.1/"}, "/webhook"),
    ],
)
async def test_what_cannot_work_is_refused_by_its_field(client, fields, pointer):
    for dry_run in (False, True):
        answer = await client.post("/jobs", json={**EVALUATE, **fields, "dry_run": dry_run})
        assert answer.status_code == 422, answer.text
        assert answer.json()["errors"][0]["pointer"] == pointer, answer.text
    assert (await client.get("/jobs")).json()["jobs"] == []


@pytest.mark.parametrize("name", ["temperature", "top_p", "time_limit_s"])
async def test_an_endless_number_is_refused(client, name):
    body = json.dumps({**EVALUATE, "config": {name: 0.5}}).replace(": 0.5}", ": 1e999}")
    headers = {"content-type": "application/json"}
    answer = await client.post("/jobs", content=body, headers=headers)
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, f"/config/{name}")


async def test_a_dry_run_counts_and_keeps_nothing(client):
    config = {"budgets": [64, 128], "samples": 3, "temperature": 0.6, "limit": 3}
    answer = await client.post("/jobs", json={**EVALUATE, "config": config, "dry_run": True})
    assert answer.status_code == 200, answer.text
    planned = answer.json()
    assert (planned["questions"], planned["generations"]) == (4, 4 * 2 * 3)
    assert planned["most_completion_tokens"] == 4 * 3 * (64 + 128)
    assert {name: data["tasks"] for name, data in planned["benchmarks"].items()} == {
        "humaneval": 3,
        "humaneval-plus": 2,
    }
    one = (await client.post(
        "/jobs", json={**EVALUATE, "config": {"limit": 1, "budgets": [64]}, "dry_run": True}
    )).json()  # fmt: skip
    assert 50 < one["prompt_tokens"] < 120, one["tokenizer"]
    assert planned["prompt_tokens"] == pytest.approx(24 * one["prompt_tokens"], rel=0.05)
    assert (await client.get("/jobs")).json()["jobs"] == []
    assert client.blobs.keys_below("local") == []


async def test_the_same_request_makes_one_job(client):
    headers = {"Idempotency-Key": "k"}
    first, again = [await client.post("/jobs", json=EVALUATE, headers=headers) for _ in "12"]
    assert first.json()["id"] == again.json()["id"]
    assert again.headers["Idempotent-Replayed"] == "true"
    other = await client.post("/jobs", json={**EVALUATE, "model": "x"}, headers=headers)
    assert (other.status_code, other.json()["code"]) == (409, "idempotency-mismatch")


async def test_its_items_are_neither_scores_nor_training_data(client):
    job = await submit(client)
    await until(client, job, "done")
    train = {"kind": "train", "base": "demo", "model": "coder", "job": job}
    for body, pointer in ((train, "/job"), ({"scores_from": job}, "/scores_from")):
        answer = await client.post("/jobs", json=body)
        assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, pointer)


async def test_a_server_without_benchmarks_says_so(client):
    client.app.state.gateway.evaluations._benchmarks._folder = None
    answer = await client.post("/jobs", json=EVALUATE)
    assert answer.status_code == 422
    assert "ASAP_BENCHMARKS" in answer.json()["detail"]
