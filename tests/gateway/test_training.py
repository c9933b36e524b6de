"""A training run through the doors of the gateway, on records that were pruned there."""

from __future__ import annotations

import asyncio
import json

import pytest

from asap.runs import TrainRun
from waiting import PATIENCE_S

TRIPLE = {"question": "q", "cot": "first step\n\nsecond\n\nthe third step", "answer": "a step"}
TRAIN = {"kind": "train", "base": "demo", "model": "coder"}
NO_JOB = "0" * 32


async def until(client, job, *phases):
    async with asyncio.timeout(PATIENCE_S):
        while True:
            state = (await client.get(f"/jobs/{job}")).json()
            if state["phase"] in phases:
                return state
            await asyncio.sleep(0.02)


@pytest.fixture
async def pruned(client):
    """The id of a prune job with four records."""
    triples = [{**TRIPLE, "id": str(n)} for n in range(4)]
    config = {"method": "asap_stage2", "max_tokens": 7}
    answer = await client.post("/jobs", json={"triples": triples, "config": config})
    await until(client, answer.json()["id"], "done")
    return answer.json()["id"]


async def submit(client, **fields):
    answer = await client.post("/jobs", json={**TRAIN, **fields})
    assert answer.status_code == 202, answer.text
    assert answer.headers["Location"] == f"/jobs/{answer.json()['id']}"
    return answer.json()["id"]


def stored(client, data, name="set.jsonl", tenant="local"):
    with client.blobs.create(f"{tenant}/sets/{name}") as writer:
        writer.write(data)
    return f"file://{client.blobs._folder}/{tenant}/sets/{name}"


def lines(*rows):
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


async def test_a_model_is_trained_on_the_records_of_a_job(client, pruned):
    job = await submit(client, job=pruned, config={"epochs": 3, "preset": "demo"})
    state = await until(client, job, "done")
    assert (state["kind"], state["total"]) == ("train", 1)
    assert state["counts"] == [{"stage": "trainer", "status": "succeeded", "items": 1}]
    assert (state["config"]["epochs"], state["config"]["gpus"]) == (3, 0)
    train = state["train"]
    assert (train["base"], train["model"], train["version"], train["attempt"]) == (
        "demo", "coder", 1, 0,
    )  # fmt: skip
    assert (train["progress"]["step"], train["result"]["loss_last"]) == (2, 0.25)
    assert train["meta"]["job"] == pruned
    assert train["meta"]["method"] == "asap_stage2"
    listed = (await client.get("/jobs")).json()["jobs"]
    assert [(body["id"], body["train"]) for body in listed] == [(job, None), (pruned, None)]


async def test_its_result_is_the_run_and_comes_in_no_other_form(client, pruned):
    job = await submit(client, job=pruned)
    await until(client, job, "done")
    answer = await client.get(f"/jobs/{job}/result")
    assert answer.headers["content-type"] == "application/x-ndjson"
    [line] = answer.text.splitlines()
    run = TrainRun.model_validate_json(line)
    assert (run.id, run.result.loss_last) == (job, 0.25)
    rows = client.blobs.open(run.data).read().splitlines()
    assert [json.loads(row)["triple"]["id"] for row in rows] == ["0", "1", "2", "3"]
    for params, accept in (
        ({"layout": "messages"}, "*/*"),
        ({"format": "parquet"}, "*/*"),
        ({}, "application/vnd.apache.parquet"),
    ):
        answer = await client.get(f"/jobs/{job}/result", params=params, headers={"accept": accept})
        assert (answer.status_code, answer.json()["code"]) == (406, "not-acceptable"), params


async def test_events_tell_the_progress_of_the_run(client, pruned, monkeypatch):
    client.trainer.steps = None
    gateway, shown = client.app.state.gateway, set()
    look = gateway.job

    def job_and_the_end_of_its_run(tenant, job_id):
        body = look(tenant, job_id)
        shown.add(body.train and body.train.progress and body.train.progress.step)
        if len(shown) > 3:
            client.trainer.steps = 0
        return body

    monkeypatch.setattr(gateway, "job", job_and_the_end_of_its_run)
    job = await submit(client, job=pruned)
    text = (await client.get(f"/jobs/{job}/events")).text
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    trains = [json.loads(one)["train"] for one in data]
    steps = [train["progress"]["step"] for train in trains if train and train["progress"]]
    assert len(set(steps)) >= 3, "while the counts stayed as they were"
    assert steps == sorted(steps)
    end = (await client.get(f"/jobs/{job}")).json()["train"]
    assert (steps[-1], trains[-1]["version"]) == (end["progress"]["step"], 1)
    assert text.count("event: end") == 1


async def test_cancelling_ends_a_run_that_waits(client, pruned):
    client.trainer.steps = None
    job = await submit(client, job=pruned)
    await until(client, job, "running", "queued")
    body = (await client.post(f"/jobs/{job}/cancel")).json()
    assert body["phase"] in ("cancelling", "cancelled")
    state = await until(client, job, "cancelled")
    assert (state["train"] or {}).get("result") is None
    assert (await client.get(f"/jobs/{job}/result")).text == ""


async def test_deleting_a_job_deletes_its_files_but_not_the_registered_model(client, pruned):
    job = await submit(client, job=pruned)
    await until(client, job, "done")
    folder = f"local/runs/{job}"
    assert {f"{folder}/data.jsonl", f"{folder}/model/weights"} < {*client.blobs.keys_below(folder)}
    assert (await client.delete(f"/jobs/{job}")).status_code == 204
    assert client.blobs.keys_below(folder) == [f"{folder}/model/weights"]
    assert (await client.get(f"/jobs/{job}")).status_code == 404
    assert (await client.get("/models/coder/1")).json()["job_id"] == job
    assert (await client.delete("/models/coder/1")).status_code == 204
    assert client.blobs.keys_below(folder) == []


async def test_deleting_a_job_without_a_model_leaves_nothing(client, pruned):
    client.trainer.steps = None
    job = await submit(client, job=pruned)
    await until(client, job, "queued", "running")
    assert client.blobs.keys_below(f"local/runs/{job}") != []
    assert (await client.delete(f"/jobs/{job}")).status_code == 204
    assert client.blobs.keys_below(f"local/runs/{job}") == []
    assert client.blobs.keys_below("local") == []


async def test_a_data_set_is_trained_on_and_stays(client):
    uri = stored(client, lines(TRIPLE))
    job = await submit(client, dataset=uri)
    state = await until(client, job, "done")
    assert state["train"]["meta"] == {"dataset": "local/sets/set.jsonl"}
    await client.delete(f"/jobs/{job}")
    assert "local/sets/set.jsonl" in client.blobs.keys_below("local")


async def test_what_is_in_common_comes_from_jobs_and_files(client, pruned):
    uri = stored(client, lines(TRIPLE))
    job = await submit(client, job=pruned, common_with=[uri, pruned])
    await until(client, job, "done")
    run = json.loads((await client.get(f"/jobs/{job}/result")).text)
    assert run["common_with"] == ["local/sets/set.jsonl", f"local/runs/{job}/common-2.jsonl"]


@pytest.mark.parametrize(
    ("fields", "status", "pointer"),
    [
        ({}, 422, ""),
        ({"job": NO_JOB, "dataset": "file:///x.jsonl"}, 422, ""),
        ({"job": "no id"}, 422, "/job"),
        ({"job": NO_JOB, "model": "Coder"}, 422, "/model"),
        ({"job": NO_JOB, "model": "../coder"}, 422, "/model"),
        ({"job": NO_JOB, "model": "x" * 64}, 422, "/model"),
        ({"job": NO_JOB, "base": ""}, 422, "/base"),
        ({"job": NO_JOB, "base": "--help"}, 422, "/base"),
        ({"job": NO_JOB, "base": "a\nb"}, 422, "/base"),
        ({"job": NO_JOB, "base": "coder@7"}, 422, "/base"),
        ({"job": NO_JOB, "config": {"epochs": 0}}, 422, "/config/epochs"),
        ({"job": NO_JOB, "config": {"epoch": 1}}, 422, "/config/epoch"),
        ({"job": NO_JOB, "config": {"gpus": 2}}, 422, "/config"),
        ({"job": NO_JOB, "cost_cap_usd": 1}, 422, "/cost_cap_usd"),
        ({"job": NO_JOB, "scores_from": NO_JOB}, 422, "/scores_from"),
        ({"job": NO_JOB, "triples": [TRIPLE]}, 422, "/triples"),
        ({"job": NO_JOB, "webhook": "http://127.0.0.1/"}, 422, "/webhook"),
        ({"job": NO_JOB, "common_with": [""]}, 422, "/common_with/0"),
        ({"dataset": "file:///etc/passwd.jsonl"}, 422, "/dataset"),
        ({"dataset": "s3://bucket/x.jsonl"}, 422, "/dataset"),
    ],
)
async def test_what_cannot_work_is_refused_by_its_field(client, fields, status, pointer):
    answer = await client.post("/jobs", json={**TRAIN, **fields})
    assert answer.status_code == status, answer.text
    assert answer.json()["errors"][0]["pointer"] == pointer, answer.text
    assert (await client.get("/jobs")).json()["jobs"] == []


async def test_an_endless_number_is_refused(client):
    body = json.dumps({**TRAIN, "job": NO_JOB, "config": {"epochs": 0}}).replace(": 0}", ": 1e999}")
    headers = {"content-type": "application/json"}
    answer = await client.post("/jobs", content=body, headers=headers)
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/config/epochs")


async def test_sources_must_be_there_ended_and_not_empty(client, pruned):
    running = await submit(client, job=pruned)
    for fields, status, code in (
        ({"job": NO_JOB}, 404, "not-found"),
        ({"job": running}, 422, "invalid-input"),
        ({"dataset": stored(client, b"", "empty.jsonl")}, 422, "invalid-input"),
        ({"dataset": stored(client, b"x", "notes.txt")}, 422, "invalid-input"),
        ({"dataset": stored(client, b"x", "theirs.jsonl", "b")}, 404, "not-found"),
        ({"job": pruned, "common_with": [NO_JOB]}, 404, "not-found"),
    ):
        answer = await client.post("/jobs", json={**TRAIN, **fields})
        assert (answer.status_code, answer.json()["code"]) == (status, code), fields
    broken = {"triples": [{**TRIPLE, "question": "crash"}], "config": {"method": "asap_stage2"}}
    empty = (await client.post("/jobs", json=broken)).json()["id"]
    await until(client, empty, "done")
    answer = await client.post("/jobs", json={**TRAIN, "job": empty})
    assert (answer.status_code, "nothing to train on" in answer.text) == (422, True)


async def test_a_job_that_runs_is_no_source(client):
    client.surprisal.go.clear()
    config = {"method": "asap_stage2"}
    body = {"triples": [{**TRIPLE, "id": str(n)} for n in range(2)], "config": config}
    source = (await client.post("/jobs", json=body)).json()["id"]
    answer = await client.post("/jobs", json={**TRAIN, "job": source})
    assert (answer.status_code, answer.json()["code"]) == (409, "results-not-ready")


async def test_scores_of_a_training_job_are_not_used_again(client, pruned):
    job = await submit(client, job=pruned)
    await until(client, job, "done")
    answer = await client.post("/jobs", json={"scores_from": job, "config": {"max_tokens": 3}})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"] == "/scores_from"


async def test_a_registered_model_is_trained_on(client, pruned):
    await until(client, await submit(client, job=pruned), "done")
    job = await submit(client, job=pruned, base="coder@1")
    state = await until(client, job, "done")
    assert (state["train"]["base"], state["train"]["version"]) == ("coder@1", 2)


async def test_a_dry_run_counts_and_keeps_nothing(client, pruned):
    answer = await client.post("/jobs", json={**TRAIN, "job": pruned, "dry_run": True})
    assert answer.status_code == 200, answer.text
    of_job = answer.json()
    assert (of_job["samples"], of_job["sample_records"]) == (4, 4)
    chat = {
        "messages": [{"role": "user", "content": "x" * 70}, {"role": "assistant", "content": ""}]
    }
    uri = stored(client, lines(*[chat] * 1500, TRIPLE))
    of_file = (await client.post("/jobs", json={**TRAIN, "dataset": uri, "dry_run": True})).json()
    assert (of_file["samples"], of_file["sample_records"]) == (1501, 1000)
    assert of_file["tokens"] == 1501 * 21, of_file["tokenizer"]
    whole = (await client.get(f"/jobs/{pruned}/result")).text.splitlines()
    text = [json.loads(line) for line in whole]
    least = sum(len(r["triple"]["question"] + r["pruned_cot"] + "a step") for r in text) / 3.5
    assert least <= of_job["tokens"] <= least + 2 * len(text)
    assert [job["id"] for job in (await client.get("/jobs")).json()["jobs"]] == [pruned]


async def test_the_same_request_makes_one_job(client, pruned):
    headers = {"Idempotency-Key": "k"}
    first, again = [
        await client.post("/jobs", json={**TRAIN, "job": pruned}, headers=headers) for _ in "12"
    ]
    assert first.json()["id"] == again.json()["id"]
    assert again.headers["Idempotent-Replayed"] == "true"
    other = await client.post(
        "/jobs", json={**TRAIN, "job": pruned, "model": "other"}, headers=headers
    )
    assert (other.status_code, other.json()["code"]) == (409, "idempotency-mismatch")
