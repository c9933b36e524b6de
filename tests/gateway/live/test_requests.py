from __future__ import annotations

import pytest

from asap.errors import InvalidInput
from asap_gateway.live.requests import read_request

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "hi"}


def refused(kind, body):
    with pytest.raises(InvalidInput) as caught:
        read_request(kind, body)
    return caught.value.problem_code, caught.value.context.get("field")


def test_our_options_do_not_reach_the_model_server():
    asked = read_request("chat/completions", CHAT | {"thinking": {"budget_tokens": 5}})
    assert asked.body == CHAT
    assert asked.thinking.budget_tokens == 5
    assert asked.path == "/v1/chat/completions"


@pytest.mark.parametrize("alias", ["thinking_token_budget", "thinking_budget"])
def test_other_names_of_the_budget(alias):
    asked = read_request("completions", TEXT | {alias: 7})
    assert asked.thinking.budget_tokens == 7
    assert alias not in asked.body


def test_sampling_extras_pass():
    extras = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "stop_token_ids": [1]}
    assert read_request("chat/completions", CHAT | extras).body == CHAT | extras


@pytest.mark.parametrize(
    "name",
    ["foo", "chat_template", "prompt_embeds", "mm_processor_kwargs", "priority", "vllm_xargs",
     "kv_transfer_params", "request_id", "documents", "prompt"],
)  # fmt: skip
def test_what_is_not_allowed_is_named(name):
    assert refused("chat/completions", CHAT | {name: None}) == ("unknown-field", name)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model": 3}, "model"),
        ({"model": ""}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [3]}, "messages[0]"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"stream": "yes"}, "stream"),
        ({"stream": 1.5}, "stream"),
        ({"stream_options": 1}, "stream_options"),
        ({"stream_options": {"x": 1}}, "stream_options"),
        ({"thinking": 3}, "thinking"),
        ({"thinking": {"budget_tokens": 0}}, "thinking.budget_tokens"),
        ({"thinking": {"budget_tokens": "9"}}, "thinking.budget_tokens"),
        ({"thinking": {"format": "xml"}}, "thinking.format"),
        ({"thinking": {"other": 1}}, "thinking.other"),
    ],
)
def test_what_is_wrong_is_named(change, field):
    assert refused("chat/completions", CHAT | change) == ("invalid-input", field)


def test_no_picture_is_fetched_for_anybody():
    part = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}
    body = CHAT | {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]}
    assert refused("chat/completions", body) == ("invalid-input", "messages[0].content")
    body["messages"][0]["content"].pop()
    assert read_request("chat/completions", body).body == body


@pytest.mark.parametrize(
    ("name", "value"),
    [("n", 2), ("tools", [{}]), ("logprobs", True), ("response_format", {"type": "json_object"})],
)
def test_what_a_bounded_thinking_cannot_keep_is_refused(name, value):
    bounded = CHAT | {"thinking": {"loop_guard": True}}
    assert refused("chat/completions", bounded | {name: value}) == ("invalid-input", name)
    assert read_request("chat/completions", CHAT | {name: value}).body[name] == value


def test_what_asks_for_nothing_goes_with_a_bounded_thinking():
    body = CHAT | {"thinking": {"loop_guard": True}, "response_format": {"type": "text"}}
    assert read_request("chat/completions", body).thinking.governed


def test_completions_take_text_or_ids_and_a_budget_takes_text():
    assert read_request("completions", {"model": "m", "prompt": [1, 2]}).body["prompt"] == [1, 2]
    bounded = {"model": "m", "prompt": [1, 2], "thinking": {"budget_tokens": 3}}
    assert refused("completions", bounded) == ("invalid-input", "prompt")
    apart = TEXT | {"thinking": {"format": "separate"}}
    assert refused("completions", apart) == ("invalid-input", "thinking.format")
    assert refused("completions", {"model": "m"}) == ("invalid-input", "prompt")


@pytest.mark.parametrize("body", [None, [], "x", 3])
def test_the_body_is_an_object(body):
    with pytest.raises(InvalidInput):
        read_request("completions", body)
