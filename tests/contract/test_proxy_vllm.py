"""Live serving in front of a real vLLM: what the fake can only assume."""

from __future__ import annotations

import json

import httpx
import pytest

from asap_gateway.live.settings import CLOSING_PHRASE
from live_gateway import live_gateway

pytestmark = [pytest.mark.contract, pytest.mark.timeout(300)]

PROMPT = [{"role": "user", "content": "Which steps of the thinking are needed?"}]
CLOSED = f"\n\n{CLOSING_PHRASE}\n</think>\n"
HOT = {"temperature": 1.0, "seed": 7, "ignore_eos": True}


@pytest.fixture
def url(vllm_server):
    return vllm_server.base_url.removesuffix("/v1")


@pytest.fixture
def http(tmp_path, url):
    with (
        live_gateway(tmp_path, endpoints={"tiny": (url,)}) as gateway,
        httpx.Client(base_url=gateway.url, timeout=60) as client,
    ):
        yield client


def ask(**changes):
    return {"model": "tiny", "messages": PROMPT, "max_tokens": 24} | HOT | changes


def events(answer):
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]", answer.text[-500:]
    return [json.loads(line) for line in lines[:-1]]


def text_of(chunks, name="content"):
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(choice["delta"].get(name) or "" for choice in choices)


def test_the_context_is_known(http):
    [model] = http.get("/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == ("tiny", 4096)


def test_a_stream_is_the_servers_own(http, url):
    ours = http.post("/v1/chat/completions", json=ask(stream=True))
    direct = httpx.post(f"{url}/v1/chat/completions", json=ask(stream=True), timeout=60)
    assert text_of(events(ours)) == text_of(events(direct))
    # Where the usage is asked for, vLLM signs that instead of the last chunk of text.
    # On a busy machine it puts several tokens into one chunk, so kinds count and not numbers.
    keys = {frozenset(chunk) - {"system_fingerprint"} for chunk in events(direct)}
    assert {frozenset(chunk) for chunk in events(ours)} == keys


def test_usage_of_a_stream(http):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    usage = events(http.post("/v1/chat/completions", json=ask(**options)))[-1]["usage"]
    assert usage["completion_tokens"] == 24
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 24


def test_more_tokens_than_the_context_has(http):
    answer = http.post("/v1/chat/completions", json=ask(max_tokens=10**6, stop=["e"]))
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("stream", [True, False])
def test_a_budget_goes_on_behind_the_closing_phrase(http, url, stream):
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    body = ask(max_tokens=400, thinking={"budget_tokens": 10}, **options)
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    if stream:
        chunks = events(answer)
        text, usage = text_of(chunks), chunks[-1]["usage"]
    else:
        body = answer.json()
        text, usage = body["choices"][0]["message"]["content"], body["usage"]
    thinking, closed, rest = text.partition(CLOSED)
    assert thinking
    assert closed
    assert rest
    # The server counts the same: prompt, thinking, phrase and answer are one text to it.
    prompt = httpx.post(
        f"{url}/v1/chat/completions",
        json=ask(max_tokens=1, return_prompt_text=True),
        timeout=60,
    ).json()
    tokens = httpx.post(
        f"{url}/tokenize",
        json={
            "model": "tiny",
            "prompt": prompt["prompt_text"] + thinking + CLOSED,
            "add_special_tokens": False,
        },
        timeout=60,
    ).json()["count"]
    assert usage["prompt_tokens"] == prompt["usage"]["prompt_tokens"]
    reasoning = usage["completion_tokens_details"]["reasoning_tokens"]
    assert reasoning == tokens - usage["prompt_tokens"]
    assert usage["completion_tokens"] > reasoning
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_budget_that_is_not_reached_changes_nothing(http):
    plain = http.post("/v1/chat/completions", json=ask()).json()
    bounded = http.post("/v1/chat/completions", json=ask(thinking={"budget_tokens": 1000})).json()
    assert bounded["choices"][0]["message"]["content"] == plain["choices"][0]["message"]["content"]
    assert bounded["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"]


def test_a_budget_for_a_completion(http):
    body = {"model": "tiny", "prompt": "Q<think>\n", "max_tokens": 300} | HOT
    answer = http.post("/v1/completions", json=body | {"thinking": {"budget_tokens": 5}}).json()
    assert CLOSED in answer["choices"][0]["text"]


def test_sampling_extras_are_taken(http):
    extras = {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.1, "min_tokens": 2}
    assert http.post("/v1/chat/completions", json=ask(**extras)).status_code == 200


def test_what_the_server_refuses(http):
    answer = http.post("/v1/chat/completions", json=ask(temperature=-3, user="planted"))
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid-input"
    assert "planted" not in answer.text
