from __future__ import annotations

import asyncio
import gzip
import io
import json

import pyarrow.parquet as pq
import pytest
from sqlalchemy import select

from asap.types import Record
from asap_runtime.database import SECOND
from asap_runtime.tables import jobs
from waiting import PATIENCE_S

TRIPLE = {"question": "q", "cot": "first step\n\nsecond\n\nthe third step", "answer": "a step"}
CONFIG = {"max_tokens": 4}


async def finished(client, job):
    async with asyncio.timeout(PATIENCE_S):
        while True:
            state = (await client.get(f"/jobs/{job}")).json()
            if state["phase"] in ("done", "cancelled"):
                return state
            await asyncio.sleep(0.02)


async def submit(client, triples, **config):
    answer = await client.post("/jobs", json={"triples": triples, "config": {**CONFIG, **config}})
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


def numbered(count, **fields):
    return [{**TRIPLE, "id": str(i), **fields} for i in range(count)]


async def test_a_job_ends_with_every_record_in_input_order(client):
    job = await submit(client, numbered(60))
    state = await finished(client, job)
    assert (state["phase"], state["total"]) == ("done", 60)
    assert state["counts"] == [{"stage": "surprisal", "status": "succeeded", "items": 60}]
    result = await client.get(f"/jobs/{job}/result")
    records = [Record.model_validate_json(line) for line in result.text.splitlines()]
    assert [record.id for record in records] == [str(i) for i in range(60)]
    chat = await client.get(f"/jobs/{job}/result", params={"layout": "messages"})
    assert json.loads(chat.text.splitlines()[0])["messages"][1]["content"].startswith("<think>\n")


@pytest.mark.parametrize(
    ("params", "accept", "media_type"),
    [
        ({}, "*/*", "application/x-ndjson"),
        ({}, "text/html, application/*;q=0.8", "application/x-ndjson"),
        ({}, "application/vnd.apache.parquet", "application/vnd.apache.parquet"),
        ({"format": "parquet"}, "*/*", "application/vnd.apache.parquet"),
        ({"format": "jsonl"}, "application/vnd.apache.parquet", "application/x-ndjson"),
    ],
)
async def test_the_format_of_a_result_is_asked_for(client, params, accept, media_type):
    job = await submit(client, numbered(3))
    await finished(client, job)
    answer = await client.get(f"/jobs/{job}/result", params=params, headers={"Accept": accept})
    assert answer.headers["content-type"].partition(";")[0] == media_type
    if media_type.endswith("parquet"):
        table = pq.read_table(io.BytesIO(answer.content))
        assert table["id"].to_pylist() == ["0", "1", "2"]
    else:
        assert len(answer.text.splitlines()) == 3


async def test_a_result_has_no_other_format(client):
    job = await submit(client, numbered(1))
    answer = await client.get(f"/jobs/{job}/result", headers={"Accept": "text/csv"})
    assert (answer.status_code, answer.json()["code"]) == (406, "not-acceptable")
    assert (await client.get(f"/jobs/{job}/result?format=csv")).status_code == 422


@pytest.mark.parametrize("layout", ["record", "messages", "triple"])
async def test_parquet_holds_what_the_lines_hold_in_input_order(client, layout):
    job = await submit(client, numbered(20))
    await finished(client, job)
    params = {"layout": layout}
    lines = await client.get(f"/jobs/{job}/result", params=params)
    rows = [json.loads(line) for line in lines.text.splitlines()]
    parquet = await client.get(f"/jobs/{job}/result", params={**params, "format": "parquet"})
    table = pq.read_table(io.BytesIO(parquet.content)).to_pylist()
    column = {"record": "pruned_cot", "messages": "messages", "triple": "cot"}[layout]
    assert [row["id"] for row in table] == [row["id"] for row in rows]
    assert [row[column] for row in table] == [row[column] for row in rows]


async def test_options_of_a_job_are_kept(client):
    body = {
        "triples": numbered(1),
        "priority": "background",
        "deadline_s": 3600,
    }
    answer = await client.post("/jobs", json=body)
    assert answer.status_code == 202, answer.text
    job = answer.json()["id"]
    with client.app.state.gateway._database.read() as connection:
        row = connection.execute(select(jobs).where(jobs.c.id == job)).mappings().one()
    assert row["priority"] == 9
    assert row["expires_at"] - row["created_at"] == 3600 * SECOND


async def test_the_original_needs_no_stage_and_is_done_at_once(client):
    job = await submit(client, numbered(3), method="original")
    state = await finished(client, job)
    assert state["counts"] == [{"stage": None, "status": "succeeded", "items": 3}]


async def test_failed_items_are_listed_and_the_others_delivered(client):
    triples = [*numbered(2), {**TRIPLE, "id": "x", "question": "crash"}, *numbered(1)]
    job = await submit(client, triples)
    await finished(client, job)
    items = (await client.get(f"/jobs/{job}/items")).json()["items"]
    assert [item["status"] for item in items] == ["succeeded", "succeeded", "failed", "succeeded"]
    assert items[2]["problem"]["code"] == "internal-error"
    assert len((await client.get(f"/jobs/{job}/result")).text.splitlines()) == 3
    failed = await client.get(f"/jobs/{job}/items", params={"status": "failed"})
    assert [item["line"] for item in failed.json()["items"]] == [3]
    retried = await client.post(f"/jobs/{job}/retry")
    assert retried.json()["phase"] in ("running", "queued", "finalizing", "done")
    assert (await finished(client, job))["phase"] == "done"


async def test_pages_follow_each_other_by_cursor(client):
    job = await submit(client, numbered(25))
    await finished(client, job)
    seen, cursor = [], None
    while True:
        params = {"limit": 10} | ({} if cursor is None else {"cursor": cursor})
        page = (await client.get(f"/jobs/{job}/items", params=params)).json()
        seen += [item["position"] for item in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == list(range(25))
    for _ in range(3):
        await submit(client, numbered(1))
    first = (await client.get("/jobs", params={"limit": 2})).json()
    second = (await client.get("/jobs", params={"limit": 2, "cursor": first["next_cursor"]})).json()
    assert len({j["id"] for j in first["jobs"] + second["jobs"]}) == 4


async def test_cancel_is_idempotent_and_keeps_what_is_done(client):
    job = await submit(client, numbered(50))
    for _ in range(2):
        answer = await client.post(f"/jobs/{job}/cancel")
        assert answer.status_code == 200
    state = await finished(client, job)
    assert sum(count["items"] for count in state["counts"]) == 50


async def test_a_deleted_job_is_gone(client):
    job = await submit(client, numbered(3))
    assert (await client.delete(f"/jobs/{job}")).status_code == 204
    for method, path in (("GET", ""), ("GET", "/items"), ("GET", "/result"), ("POST", "/cancel"),
                         ("POST", "/retry"), ("DELETE", ""), ("GET", "/events")):  # fmt: skip
        answer = await client.request(method, f"/jobs/{job}{path}")
        assert (answer.status_code, answer.json()["code"]) == (404, "not-found"), (method, path)


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        ({"content": b"{not json"}, 400, "malformed-json"),
        ({"json": {"triples": []}}, 422, "invalid-input"),
        ({"json": {"triples": numbered(101)}}, 413, "too-many-items"),
        ({"json": {"triples": numbered(1), "kind": "train"}}, 422, "invalid-input"),
        ({"json": {"triples": numbered(1, cot="x" * 300_000)}}, 413, "payload-too-large"),
        ({"content": b"[" * 100_000}, 400, "malformed-json"),
        ({"content": b"[" * 65 + b"]" * 65}, 400, "malformed-json"),
        ({"content": b'{"triples": [], "triples": []}'}, 422, "invalid-input"),
        ({"content": b'{"triples": "\xff"}'}, 400, "invalid-utf8"),
        ({"content": json.dumps({"triples": numbered(1, cot="\ud800")})}, 400, "invalid-utf8"),
        (
            {"content": b"{}", "headers": {"content-type": "text/plain"}},
            415,
            "unsupported-media-type",
        ),
        (
            {"content": gzip.compress(b"{}"), "headers": {"content-encoding": "gzip"}},
            415,
            "unsupported-media-type",
        ),
    ],
)
async def test_bad_bodies(client, request_, status, code):
    request_ = dict(request_)
    headers = {"content-type": "application/json", **request_.pop("headers", {})}
    answer = await client.post("/jobs", headers=headers, **request_)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == code


async def test_events_tell_the_progress_and_the_end(client):
    job = await submit(client, numbered(30))
    events = []
    async with client.stream("GET", f"/jobs/{job}/events") as stream:
        async for line in stream.aiter_lines():
            if line.startswith("event: "):
                events.append(line.removeprefix("event: "))
            if line.startswith("data: "):
                last = json.loads(line.removeprefix("data: "))
    assert events[-1] == "end"
    assert (last["phase"], last["finished_items"], last["total"]) == ("done", 30, 30)


async def test_retrying_a_job_without_failures_changes_nothing(client):
    job = await submit(client, numbered(3))
    before = await finished(client, job)
    assert (await client.post(f"/jobs/{job}/retry")).json() == before
