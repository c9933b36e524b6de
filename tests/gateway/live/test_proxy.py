"""Live serving over real HTTP: what callers of `/v1` get."""

from __future__ import annotations

import json

import httpx
import pytest

from asap_gateway.live.settings import CLOSING_PHRASE
from fake_vllm import FakeVllm, Say
from live_gateway import live_gateway
from waiting import PATIENCE_S, until

ASK = {"model": "asap", "messages": [{"role": "user", "content": "hi there"}]}
THOUGHT = Say("I", " think", " so", "</think>", "\n", "yes")
WITH_USAGE = {"stream": True, "stream_options": {"include_usage": True}}
CLOSED = f"\n\n{CLOSING_PHRASE}\n</think>\n"


@pytest.fixture
def upstream():
    with FakeVllm(script=[THOUGHT]) as server:
        yield server


@pytest.fixture
def gateway(tmp_path, upstream):
    endpoints = {"asap": (upstream.url,)}
    with live_gateway(tmp_path, endpoints=endpoints, baseline_tokens={"asap": 100}) as gateway:
        yield gateway


@pytest.fixture
def http(gateway):
    with httpx.Client(base_url=gateway.url, timeout=PATIENCE_S) as client:
        yield client


def chat(http, **changes):
    answer = http.post("/v1/chat/completions", json=ASK | changes)
    assert answer.status_code == 200, answer.text
    return answer


def chunks(answer):
    """The parsed events of a stream that ends as it should."""
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def deltas(answer, name="content"):
    choices = [choice for chunk in chunks(answer) for choice in chunk["choices"]]
    return "".join(choice["delta"].get(name) or "" for choice in choices)


def test_a_stream_passes_byte_for_byte(http, upstream):
    direct = httpx.post(
        f"{upstream.url}/v1/chat/completions", json=ASK | {"stream": True}, timeout=PATIENCE_S
    )
    assert chat(http, stream=True).content == direct.content
    assert upstream.requests[-1].body["stream_options"] == {"include_usage": True}
    assert http.post(
        "/v1/completions", json={"model": "asap", "prompt": "x", "stream": True}
    ).content == (
        httpx.post(
            f"{upstream.url}/v1/completions",
            json={"model": "asap", "prompt": "x", "stream": True},
            timeout=PATIENCE_S,
        ).content
    )


def test_usage_is_told_to_who_asks(http):
    *_, last = chunks(chat(http, **WITH_USAGE))
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 6,
        "total_tokens": 8,
        "completion_tokens_details": {"reasoning_tokens": 3},
        "asap_tokens_saved": 94,
    }
    assert not any(chunk.get("usage") for chunk in chunks(chat(http, stream=True)))


def test_a_whole_answer_has_usage_and_saving(http):
    answer = chat(http)
    assert answer.headers["x-asap-tokens-saved"] == "94"
    body = answer.json()
    assert body["choices"][0]["message"]["content"] == "I think so</think>\nyes"
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 3}


@pytest.mark.parametrize("stream", [True, False])
def test_thinking_and_answer_apart(http, stream):
    answer = chat(http, stream=stream, thinking={"format": "separate"})
    if stream:
        got = deltas(answer, "reasoning_content"), deltas(answer)
    else:
        message = answer.json()["choices"][0]["message"]
        got = message["reasoning_content"], message["content"]
    assert got == ("I think so", "yes")


def test_several_choices_are_each_taken_apart(http):
    answer = chat(http, n=3, thinking={"format": "separate"})
    assert [one["message"]["content"] for one in answer.json()["choices"]] == ["yes"] * 3


@pytest.mark.parametrize("stream", [True, False])
def test_a_budget_closes_the_thinking_and_goes_on(http, upstream, stream):
    answer = chat(http, thinking={"budget_tokens": 2}, **(WITH_USAGE if stream else {}))
    text = deltas(answer) if stream else answer.json()["choices"][0]["message"]["content"]
    assert text == f"I think{CLOSED}the answer"
    usage = chunks(answer)[-1]["usage"] if stream else answer.json()["usage"]
    [first], [second] = upstream.asked("/v1/chat/completions"), upstream.asked("/v1/completions")
    assert first["return_prompt_text"]
    assert second["prompt"] == f"<user>hi there<assistant><think>\nI think{CLOSED}"
    assert second["add_special_tokens"] is False
    whole = len(second["prompt"].split()) - 2  # as the fake counts
    assert usage["completion_tokens_details"]["reasoning_tokens"] == whole
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (2, whole + 2)
    if stream:
        names = {(chunk["id"], chunk["object"]) for chunk in chunks(answer)}
        assert names == {("chat.completion-1", "chat.completion.chunk")}
        finishes = [c["finish_reason"] for chunk in chunks(answer) for c in chunk["choices"]]
        assert finishes[-1] == "stop"
        assert set(finishes[:-1]) == {None}


def test_a_budget_with_the_thinking_apart(http):
    answer = chat(http, stream=True, thinking={"budget_tokens": 2, "format": "separate"})
    assert deltas(answer, "reasoning_content") == f"I think\n\n{CLOSING_PHRASE}"
    assert deltas(answer) == "the answer"


def test_a_thinking_within_its_budget_is_left_alone(http, upstream):
    for budget in (3, 4, 100):
        answer = chat(http, thinking={"budget_tokens": budget})
        assert answer.json()["choices"][0]["message"]["content"] == "I think so</think>\nyes"
        assert answer.json()["usage"]["completion_tokens_details"]["reasoning_tokens"] == 3
    assert upstream.asked("/v1/completions") == []


async def test_a_budget_ends_the_generation_at_the_server(http, upstream):
    upstream.script = [Say(*["word "] * 5000, gap_s=0.05)]  # it would take minutes
    chat(http, thinking={"budget_tokens": 20})
    await until(lambda: not upstream.concurrent)
    assert len(upstream.cancelled) == 1


def test_max_tokens_holds_over_both_parts(http, upstream):
    upstream.after = [Say(*["a "] * 500)]
    answer = chat(http, max_tokens=60, thinking={"budget_tokens": 2}).json()
    [second] = upstream.asked("/v1/completions")
    assert 0 < second["max_tokens"] < 60
    assert answer["usage"]["completion_tokens"] <= 60
    assert answer["choices"][0]["finish_reason"] == "length"


def test_no_room_behind_the_closing_phrase_is_a_length(http, upstream):
    answer = chat(http, max_tokens=5, thinking={"budget_tokens": 2}, **WITH_USAGE)
    assert deltas(answer) == "I think"
    assert [c["finish_reason"] for c in chunks(answer)[-2]["choices"]] == ["length"]
    usage = chunks(answer)[-1]["usage"]
    assert (usage["completion_tokens"], usage["total_tokens"]) == (2, 4)
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 2
    assert upstream.asked("/v1/completions") == []


def test_a_budget_for_completions_knows_the_prompt(http, upstream):
    ask = {"model": "asap", "prompt": "Q<think>\n", "max_tokens": 90, "thinking_token_budget": 2}
    answer = http.post("/v1/completions", json=ask).json()
    assert answer["choices"][0]["text"] == f"I think{CLOSED}the answer"
    assert upstream.requests[-1].body["prompt"] == f"Q<think>\nI think{CLOSED}"
    assert "add_special_tokens" not in upstream.requests[-1].body
    unopened = http.post("/v1/completions", json=ask | {"prompt": "Q"}).json()
    assert unopened["choices"][0]["text"] == "I think so</think>\nyes"


def test_many_tokens_in_one_piece_do_not_pass_the_budget(http, upstream):
    upstream.script = [Say(*["w "] * 40, per_chunk=8)]
    for kind, ask in (
        ("chat/completions", ASK),
        ("completions", {"model": "asap", "prompt": "Q<think>\n"}),
    ):
        for budget, kept in ((3, 0), (8, 8), (17, 16)):
            body = ask | {"max_tokens": 200, "thinking": {"budget_tokens": budget}}
            [choice] = http.post(f"/v1/{kind}", json=body).json()["choices"]
            text = choice.get("text") or choice["message"]["content"]
            assert text == f"{'w ' * kept}{CLOSED}the answer"


def test_a_loop_is_closed(http, upstream):
    upstream.script = [Say(*["but wait, let me check that again. "] * 1000)]
    text = chat(http, thinking={"loop_guard": True}).json()["choices"][0]["message"]["content"]
    assert text.endswith(f"{CLOSED}the answer")
    assert text.count("but wait") < 40


def test_a_long_thinking_without_a_loop_is_left_alone(http, upstream):
    upstream.script = [Say(*[f"step {n}: {n * n}. " for n in range(400)], "</think>", "yes")]
    text = chat(http, thinking={"loop_guard": True}).json()["choices"][0]["message"]["content"]
    assert text.endswith("step 399: 159201. </think>yes")
    assert upstream.asked("/v1/completions") == []


def test_without_options_a_loop_is_the_callers(http, upstream):
    upstream.script = [Say(*["but wait, let me check that again. "] * 50)]
    assert chat(http).json()["choices"][0]["message"]["content"].count("but wait") == 50


def test_a_model_that_opens_its_thinking_itself(tmp_path, upstream):
    upstream.script = [Say("plain", " answer")]
    settings = {"endpoints": {"asap": (upstream.url,)}, "unopened": ("asap",)}
    with (
        live_gateway(tmp_path, **settings) as gateway,
        httpx.Client(base_url=gateway.url, timeout=PATIENCE_S) as http,
    ):
        message = chat(http, thinking={"format": "separate"}).json()["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("", "plain answer")
        upstream.script = [Say("<think>", "a", "</think>", "b")]
        answer = chat(http, stream=True, thinking={"format": "separate"})
        assert (deltas(answer, "reasoning_content"), deltas(answer)) == ("a", "b")


def test_max_tokens_is_clamped_to_the_context(http, upstream):
    chat(http, max_tokens=10**9, max_completion_tokens=12)
    assert upstream.requests[-1].body["max_tokens"] == 4096
    assert upstream.requests[-1].body["max_completion_tokens"] == 12


def test_nothing_of_the_callers_headers_goes_on(tmp_path, upstream):
    settings = {"endpoints": {"asap": (upstream.url,)}, "api_key": "upstream-key"}
    with live_gateway(tmp_path, keyed=True, **settings) as gateway:
        _, token = gateway.keys.create("t", "k", "submit")
        headers = {"Authorization": f"Bearer {token}", "X-Api-Key": token, "Cookie": "a=b"}
        answer = httpx.post(
            f"{gateway.url}/v1/chat/completions", json=ASK, headers=headers, timeout=PATIENCE_S
        )
        assert answer.status_code == 200
    seen = upstream.requests[-1].headers
    assert seen["Authorization"] == "Bearer upstream-key"
    assert not {"Cookie", "X-Api-Key"} & set(seen)
    assert token not in str(seen)


def test_models_are_listed(http):
    listed = http.get("/v1/models").json()
    assert [(one["id"], one["max_model_len"]) for one in listed["data"]] == [("asap", 4096)]
    assert http.get("/v1/models/asap").json() == listed["data"][0]


def test_every_error_has_the_shape_of_openai(tmp_path, upstream):
    limits = {"requests_per_s": 0.001, "request_burst": 12, "max_body_bytes": 2000}
    settings = {"endpoints": {"asap": (upstream.url,)}, "tokens_per_minute": 1}
    with live_gateway(tmp_path, keyed=True, limits=limits, **settings) as gateway:
        _, token = gateway.keys.create("t", "k", "submit")
        _, reader = gateway.keys.create("t", "r", "read")

        def ask(status, code, key=token, path="chat/completions", param=None, **body):
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            answer = httpx.post(
                f"{gateway.url}/v1/{path}", json=ASK | body, headers=headers, timeout=PATIENCE_S
            )
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
            assert error["message"]
            assert set(error) == {"message", "type", "param", "code"}

        ask(401, "unauthorized", key=None)
        ask(403, "forbidden-role", key=reader)
        ask(404, "not-found", param="model", model="nothing")
        ask(404, "not-found", path="embeddings")
        ask(400, "unknown-field", param="wrong", wrong=1)
        ask(413, "payload-too-large", user="x" * 3000)
        headers = {"Authorization": f"Bearer {token}"}
        url = f"{gateway.url}/v1/chat/completions"
        assert httpx.post(url, json=ASK, headers=headers, timeout=PATIENCE_S).status_code == 200
        ask(429, "rate-limited")  # tokens
        form = httpx.post(url, data={"a": "b"}, headers=headers, timeout=PATIENCE_S)
        assert (form.status_code, form.json()["error"]["code"]) == (415, "unsupported-media-type")
        wrong = httpx.post(
            url,
            content=b"{",
            headers=headers | {"content-type": "application/json"},
            timeout=PATIENCE_S,
        )
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "malformed-json")
        assert "Allow" in httpx.delete(url, headers=headers, timeout=PATIENCE_S).headers
        for _ in range(5):
            last = httpx.post(url, json=ASK, headers=headers, timeout=PATIENCE_S)
        assert (last.status_code, last.json()["error"]["code"]) == (429, "rate-limited")
        assert int(last.headers["Retry-After"]) > 60  # requests


def test_another_tenants_model_does_not_exist(tmp_path, upstream):
    with live_gateway(tmp_path, keyed=True) as gateway:
        gateway.endpoints.announce(
            "one", "asap", upstream.url, version=2, baseline_tokens=50.0, lease_s=3600
        )
        tokens = {name: gateway.keys.create(name, "k", "submit")[1] for name in ("one", "two")}

        def ask(tenant):
            headers = {"Authorization": f"Bearer {tokens[tenant]}"}
            return httpx.post(
                f"{gateway.url}/v1/chat/completions", json=ASK, headers=headers, timeout=PATIENCE_S
            )

        answer = ask("one")
        while answer.status_code == 404:  # until the table is read
            answer = ask("one")
        assert answer.headers["x-asap-tokens-saved"] == "44"
        assert ask("two").status_code == 404


def test_requests_are_measured_and_leave_no_trace(http, gateway, upstream):
    chat(http, stream=True, messages=[{"role": "user", "content": "planted words"}])
    text = http.get("/metrics").text
    assert 'asap_proxy_seconds_count{model="asap",status="200"}' in text
    assert 'asap_proxy_tokens_total{model="asap",part="reasoning"}' in text
    assert "planted" not in text
