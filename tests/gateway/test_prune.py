from __future__ import annotations

import asyncio

import pytest

from asap.types import Record
from waiting import PATIENCE_S

TRIPLE = {"question": "q", "cot": "first step\n\nsecond\n\nthe third step", "answer": "a step"}


async def test_one_triple_is_answered_with_its_record(client):
    answer = await client.post("/prune", json={"triple": TRIPLE, "config": {"max_tokens": 4}})
    assert answer.status_code == 200
    record = Record.model_validate_json(answer.content)
    assert (record.triple.question, record.triple.answer) == ("q", "a step")
    assert record.tokens.pruned <= 4
    assert record.config.anchor == "extractive"  # the server's default where no LLM is configured


async def test_without_a_wait_the_answer_is_a_job_and_its_location(client):
    answer = await client.post("/prune", json={"triple": TRIPLE, "wait_s": 0})
    assert answer.status_code == 202
    job = answer.headers["Location"]
    assert job == f"/jobs/{answer.json()['id']}"
    async with asyncio.timeout(PATIENCE_S):
        while (await client.get(job)).json()["phase"] != "done":  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    result = await client.get(f"{job}/result")
    assert Record.model_validate_json(result.content).status in ("compressed", "unchanged")


@pytest.mark.parametrize(
    ("body", "pointer", "code"),
    [
        ({}, "/triple", "invalid-input"),
        ({"triple": {**TRIPLE, "answer": 5}}, "/triple/answer", "invalid-input"),
        ({"triple": TRIPLE, "wait_s": 61}, "/wait_s", "invalid-input"),
        ({"triple": TRIPLE, "extra": 1}, "/extra", "invalid-input"),
        ({"triple": TRIPLE, "config": {"tau": 5}}, "/config/tau", "invalid-input"),
        ({"triple": TRIPLE, "config": {"budget": 5}}, "/config/budget", "invalid-input"),
        (
            {"triple": {**TRIPLE, "cot": "a </think> b"}},
            "/triple/cot",
            "control-token-in-text",
        ),
    ],
)
async def test_a_wrong_value_is_named_by_pointer(client, body, pointer, code):
    answer = await client.post("/prune", json=body)
    problem = answer.json()
    assert answer.status_code == problem["status"] == 422
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["type"] == f"urn:asap:problem:{code}"
    assert [error["pointer"] for error in problem["errors"]] == [pointer]


async def test_an_unknown_method_is_a_problem_with_the_nearest_name(client):
    answer = await client.post("/prune", json={"triple": TRIPLE, "config": {"method": "asapp"}})
    assert answer.json()["code"] == "unknown-method"
    assert "did you mean 'asap'" in answer.json()["detail"]


async def test_a_failed_item_is_a_problem_without_a_word_of_the_trace(client):
    triple = {**TRIPLE, "question": "crash"}
    answer = await client.post("/prune", json={"triple": triple})
    assert answer.status_code == 500
    assert answer.json()["code"] == "internal-error"
    assert "secret" not in answer.text
    answer = await client.post("/prune", json={"triple": TRIPLE, "config": {"anchor": "llm"}})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid-input")


async def test_many_callers_at_once_each_get_their_own(client):
    async def one(i):
        body = {"triple": {**TRIPLE, "id": str(i)}, "config": {"max_tokens": 4}}
        return (await client.post("/prune", json=body)).json()["id"]

    assert await asyncio.gather(*map(one, range(40))) == [str(i) for i in range(40)]
