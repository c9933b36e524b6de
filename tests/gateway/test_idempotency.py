from __future__ import annotations

import asyncio

TRIPLE = {"question": "q", "cot": "first step\n\nsecond\n\nthe third step", "answer": "a step"}


async def submit(client, key, body=None):
    body = body or {"triples": [TRIPLE]}
    return await client.post("/jobs", json=body, headers={"Idempotency-Key": key})


async def jobs(client):
    return (await client.get("/jobs")).json()["jobs"]


async def test_a_repetition_hears_the_first_answer_and_does_nothing(client):
    first = await submit(client, "k")
    again = await submit(client, "k")
    assert (again.status_code, again.content) == (202, first.content)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.headers["Location"] == first.headers["Location"]
    assert len(await jobs(client)) == 1


async def test_the_order_of_keys_in_the_body_does_not_matter_another_body_does(client):
    await submit(client, "k", {"triples": [TRIPLE], "config": {"max_tokens": 5}})
    same = await submit(client, "k", {"config": {"max_tokens": 5}, "triples": [TRIPLE]})
    assert same.headers["Idempotent-Replayed"] == "true"
    other = await submit(client, "k", {"triples": [TRIPLE], "config": {"max_tokens": 6}})
    assert (other.status_code, other.json()["code"]) == (409, "idempotency-mismatch")
    assert other.headers["content-type"] == "application/problem+json"


async def test_of_many_at_once_one_is_worked_on(client):
    answers = await asyncio.gather(*(submit(client, "k") for _ in range(12)))
    assert {a.status_code for a in answers} <= {202, 409}
    assert len(await jobs(client)) == 1
    refused = [a for a in answers if a.status_code == 409]
    assert all(a.json()["code"] == "idempotency-in-progress" for a in refused)
    assert all(a.headers["Retry-After"] for a in refused)


async def test_a_refused_request_leaves_the_key_free(client):
    assert (await submit(client, "k", {"triples": []})).status_code == 422
    assert (await submit(client, "k")).status_code == 202


async def test_prune_takes_keys_too_and_keys_have_a_length(client):
    body = {"triple": TRIPLE}
    first = await client.post("/prune", json=body, headers={"Idempotency-Key": "p"})
    again = await client.post("/prune", json=body, headers={"Idempotency-Key": "p"})
    assert first.status_code == again.status_code == 200
    assert first.content == again.content
    assert (await submit(client, "x" * 256)).status_code == 422
