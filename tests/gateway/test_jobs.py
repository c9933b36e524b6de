from __future__ import annotations

import asyncio
import gzip
import json

import pytest

from asap.types import Record

TRIPLE = {"question": "q", "cot": "first step\n\nsecond\n\nthe third step", "answer": "a step"}
CONFIG = {"max_tokens": 4}


async def finished(client, job):
    for _ in range(300):
        state = (await client.get(f"/jobs/{job}")).json()
        if state["phase"] in ("done", "cancelled"):
            return state
        await asyncio.sleep(0.02)
    raise AssertionError(state)


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


@pytest.mark.parametrize("compressed", [False, True])
async def test_an_uploaded_file_is_a_job_and_its_bad_lines_are_failed_items(client, compressed):
    lines = [json.dumps(triple) for triple in numbered(5)]
    lines[1:1] = ["{broken", json.dumps({**TRIPLE, "cot": "<think>"})]
    data, name = "\n".join(lines).encode(), "in.jsonl"
    if compressed:
        data, name = gzip.compress(data), "in.jsonl.gz"
    answer = await client.post(
        "/jobs/upload",
        files={"file": (name, data)},
        data={"options": json.dumps({"config": CONFIG})},
    )
    assert answer.status_code == 202, answer.text
    state = await finished(client, answer.json()["id"])
    assert state["total"] == 7
    items = (await client.get(f"/jobs/{state['id']}/items")).json()["items"]
    failed = {item["line"]: item["problem"]["code"] for item in items if item["status"] == "failed"}
    assert failed == {2: "malformed-json", 3: "control-token-in-text"}
    assert len((await client.get(f"/jobs/{state['id']}/result")).text.splitlines()) == 5


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
        ({"json": {"triples": numbered(101)}}, 422, "too-many-items"),
        ({"json": {"triples": numbered(1), "kind": "train"}}, 422, "invalid-input"),
        ({"json": {"triples": numbered(1, cot="x" * 300_000)}}, 413, "payload-too-large"),
        ({"content": b"[" * 100_000}, 400, "malformed-json"),
        ({"content": json.dumps({"triples": numbered(1, cot="\ud800")})}, 422, "invalid-utf8"),
    ],
)
async def test_bad_bodies(client, request_, status, code):
    answer = await client.post("/jobs", headers={"content-type": "application/json"}, **request_)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == code


@pytest.mark.parametrize(
    ("name", "data", "options"),
    [
        ("in.txt", b"x", "{}"),
        ("in.jsonl", b'{"text": 1}\n', "{}"),
        ("in.jsonl", b"", "{}"),
        ("in.parquet", b"no parquet", "{}"),
        ("../../in.jsonl", b"", "{}"),
        ("in.jsonl", b"{}", "[1]"),
        ("in.jsonl", b"{}", "{"),
        ("in.jsonl", b"{}", '{"tau": 7}'),
        ("in.jsonl", b"{}", '{"config": {"tau": 7}}'),
    ],
)
async def test_bad_uploads(client, name, data, options):
    answer = await client.post(
        "/jobs/upload", files={"file": (name, data)}, data={"options": options}
    )
    assert answer.status_code == 422, answer.text
    assert (await client.get("/jobs")).json()["jobs"] == []


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


async def test_a_target_of_the_request_displaces_the_servers(client):
    client.app.state.gateway.submissions._defaults["max_tokens"] = 4
    body = {"triple": TRIPLE, "config": {"keep_ratio": 0.5}}
    answer = await client.post("/prune", json=body)
    config = answer.json()["config"]
    assert (config["max_tokens"], config["keep_ratio"]) == (None, 0.5)
