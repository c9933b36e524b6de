"""What may be said of a job beside its triples: an estimate instead, a cap, scores used again."""

from __future__ import annotations

import asyncio
import json

import pytest

from waiting import PATIENCE_S

TRIPLE = {"question": "q", "cot": "first step\n\nsecond\n\nthe third step", "answer": "a step"}
CONFIG = {"method": "asap_stage2", "max_tokens": 7}


def numbered(count, **fields):
    return [{**TRIPLE, "id": str(i), **fields} for i in range(count)]


async def finished(client, job):
    async with asyncio.timeout(PATIENCE_S):
        while True:
            state = (await client.get(f"/jobs/{job}")).json()
            if state["finished_at"] is not None:
                return state
            await asyncio.sleep(0.02)


async def submit(client, **body):
    answer = await client.post("/jobs", json=body)
    assert answer.status_code == 202, answer.text
    assert answer.headers["Location"] == f"/jobs/{answer.json()['id']}"
    return answer.json()["id"]


async def records(client, job):
    lines = (await client.get(f"/jobs/{job}/result")).text.splitlines()
    return [json.loads(line) for line in lines]


async def test_a_dry_run_answers_with_an_estimate_and_keeps_nothing(client):
    body = {"triples": numbered(3), "config": {"anchor": "llm"}, "dry_run": True}
    answer = await client.post("/jobs", json=body)
    assert answer.status_code == 200, answer.text
    planned = answer.json()
    assert (planned["records"], planned["llm_calls"]) == (3, 6)
    money = planned["prompt_tokens"] * 1.0 + planned["completion_tokens"] * 2.0
    assert planned["cost_usd"] == pytest.approx(money / 1e6)
    assert (await client.get("/jobs")).json()["jobs"] == []


async def test_a_dry_run_of_an_upload_reads_it_and_deletes_it(client, tmp_path):
    data = "\n".join([*(json.dumps(t) for t in numbered(40)), "{broken"]).encode()
    answer = await client.post(
        "/jobs/upload", files={"file": ("in.jsonl", data)}, data={"options": '{"dry_run": true}'}
    )
    assert answer.status_code == 200, answer.text
    assert (answer.json()["records"], answer.json()["bad_lines"]) == (40, 1)
    assert (await client.get("/jobs")).json()["jobs"] == []
    assert list(client.app.state.gateway.submissions.blobs.uploads()) == []


async def test_a_job_whose_estimate_is_above_its_cap_is_refused(client):
    body = {"triples": numbered(3), "config": {"anchor": "llm"}, "cost_cap_usd": 1e-6}
    answer = await client.post("/jobs", json=body)
    assert (answer.status_code, answer.json()["code"]) == (402, "cost-cap-reached")
    lines = "\n".join(json.dumps(t) for t in numbered(3)).encode()
    options = json.dumps({key: value for key, value in body.items() if key != "triples"})
    answer = await client.post(
        "/jobs/upload", files={"file": ("in.jsonl", lines)}, data={"options": options}
    )
    assert (answer.status_code, answer.json()["code"]) == (402, "cost-cap-reached")
    assert (await client.get("/jobs")).json()["jobs"] == []


async def test_another_budget_for_an_ended_job_needs_no_stage(client):
    first = await submit(client, triples=numbered(4), config=CONFIG)
    assert (await finished(client, first))["phase"] == "done"
    second = await submit(client, scores_from=first, config={"max_tokens": 3})
    state = await finished(client, second)
    assert state["counts"] == [{"stage": None, "status": "succeeded", "items": 4}]
    direct = await submit(client, triples=numbered(4), config={**CONFIG, "max_tokens": 3})
    await finished(client, direct)
    assert await records(client, second) == await records(client, direct)
    assert (await records(client, second))[0]["pruned_cot"] != (await records(client, first))[0][
        "pruned_cot"
    ]


async def test_scores_are_used_again_only_where_they_answer(client):
    unknown = await client.post("/jobs", json={"scores_from": "0" * 32})
    assert (unknown.status_code, unknown.json()["code"]) == (404, "not-found")
    job = await submit(client, triples=numbered(2), config=CONFIG)
    await finished(client, job)
    other = await client.post("/jobs", json={"scores_from": job, "config": {"split": "paper"}})
    assert other.status_code == 422, other.text
    assert other.json()["errors"][0]["pointer"] == "/config/split"


async def test_custom_ids_name_the_items_and_are_unique(client):
    triples = [{**TRIPLE, "meta": {"custom_id": name}} for name in ("a", "b", "a")]
    job = await submit(client, triples=triples, config=CONFIG)
    await finished(client, job)
    items = (await client.get(f"/jobs/{job}/items")).json()["items"]
    assert [item["custom_id"] for item in items] == ["a", "b", None]
    assert [item["status"] for item in items] == ["succeeded", "succeeded", "failed"]


async def test_a_webhook_of_another_host_is_refused(client):
    for url in ("https://evil.example/x", "http://example.org/x", "https://127.0.0.1/x"):
        answer = await client.post("/jobs", json={"triples": numbered(1), "webhook": url})
        assert answer.status_code == 422, url
        assert answer.json()["errors"][0]["pointer"] == "/webhook"


@pytest.mark.parametrize("body", [{}, {"triples": numbered(1), "scores_from": "x"}])
async def test_there_is_exactly_one_source(client, body):
    answer = await client.post("/jobs", json=body)
    assert answer.status_code == 422
    assert "exactly one" in answer.json()["detail"]
