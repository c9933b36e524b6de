"""The examples of the OpenAPI description, run."""

from __future__ import annotations

import pytest

from asap_gateway.examples import EXAMPLES, PLACES


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: f"{e.method} {e.path}: {e.name}")
async def test_an_example_gets_the_answer_that_is_shown(client, example):
    given = {"json": example.body}
    if isinstance(example.body, bytes):
        given = {"content": example.body, "headers": {"content-type": example.media_type}}
    path = example.path.format(**PLACES)
    answer = await client.request(example.method, path, **given)
    assert answer.status_code == example.status, answer.text
    if example.code is not None:
        assert answer.headers["content-type"] == "application/problem+json"
        shown = described(client.app, example)
        assert {name: answer.json()[name] for name in shown} == shown
        assert (shown["code"], shown["detail"]) == (example.code, example.detail)


def described(app, example):
    operation = app.openapi()["paths"][example.path][example.method]
    content = operation["responses"][str(example.status)]["content"]
    return content["application/problem+json"]["examples"][example.name]["value"]


async def test_requests_are_shown_and_keys_are_named(client):
    description = (await client.get("/openapi.json")).json()
    for example in EXAMPLES:
        if example.code is None:
            operation = description["paths"][example.path][example.method]
            [content] = operation["requestBody"]["content"].values()
            assert content["examples"][example.name]["value"] == example.body
    assert description["components"]["securitySchemes"]["ApiKey"]["scheme"] == "bearer"
