"""OpenAI's own Python client against the gateway: what its users write must work as it is."""

from __future__ import annotations

import pytest

from fake_vllm import FakeVllm, Say, Status
from live_gateway import live_gateway
from waiting import PATIENCE_S, until

openai = pytest.importorskip("openai", reason="comes with vLLM: tests/engines/install.sh PYTHON")

pytestmark = pytest.mark.contract

MESSAGES = [{"role": "user", "content": "hi there"}]
THOUGHT = Say("I", " think", " so", "</think>", "\n", "yes")


@pytest.fixture
def upstream():
    with FakeVllm(script=[THOUGHT]) as server:
        yield server


@pytest.fixture
def gap_s():
    """The longest silence in a stream."""
    return PATIENCE_S


@pytest.fixture
def gateway(tmp_path, upstream, gap_s):
    settings = {"endpoints": {"asap": (upstream.url,)}, "gap_s": gap_s}
    with live_gateway(tmp_path, keyed=True, **settings) as gateway:
        yield gateway


@pytest.fixture
def client(gateway):
    _, token = gateway.keys.create("t", "k", "submit")
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=token, max_retries=0) as client:
        yield client


def test_models(client):
    assert [model.id for model in client.models.list()] == ["asap"]
    assert client.models.retrieve("asap").id == "asap"


def test_a_chat_completion(client):
    answer = client.chat.completions.create(model="asap", messages=MESSAGES, max_tokens=100)
    assert answer.choices[0].message.content == "I think so</think>\nyes"
    assert answer.usage.completion_tokens_details.reasoning_tokens == 3


def test_a_stream(client):
    stream = client.chat.completions.create(
        model="asap", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "I think so</think>\nyes"
    assert chunks[-1].usage.completion_tokens_details.reasoning_tokens == 3


def test_a_completion(client):
    answer = client.completions.create(model="asap", prompt="Q<think>\n", max_tokens=100)
    assert answer.choices[0].text == "I think so</think>\nyes"


def test_our_options_go_in_the_extra_body(client):
    stream = client.chat.completions.create(
        model="asap",
        messages=MESSAGES,
        stream=True,
        extra_body={"thinking": {"budget_tokens": 2, "format": "separate"}},
    )
    deltas = [chunk.choices[0].delta for chunk in stream]
    assert "".join(delta.content or "" for delta in deltas) == "the answer"
    thinking = "".join(getattr(delta, "reasoning_content", "") or "" for delta in deltas)
    assert thinking.startswith("I think\n\n")


@pytest.mark.parametrize(
    ("wrong", "error", "param"),
    [
        ({"model": "other"}, openai.NotFoundError, "model"),
        ({"extra_body": {"foo": 1}}, openai.BadRequestError, "foo"),
        ({"extra_body": {"thinking": 1}}, openai.BadRequestError, "thinking"),
    ],
)
def test_errors_are_those_that_the_client_knows(client, wrong, error, param):
    with pytest.raises(error) as caught:
        client.chat.completions.create(**{"model": "asap", "messages": MESSAGES} | wrong)
    assert caught.value.param == param
    assert caught.value.code
    assert caught.value.body["message"]


def test_a_wrong_key(gateway):
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="wrong", max_retries=0)
    with client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_a_server_that_fails(client, upstream):
    upstream.script = [Status(500)]
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model="asap", messages=MESSAGES)


def test_the_client_retries_what_it_may(client, upstream):
    upstream.script = [Status(503), THOUGHT]
    answer = client.with_options(max_retries=2).chat.completions.create(
        model="asap", messages=MESSAGES
    )
    assert answer.choices[0].message.content


@pytest.mark.parametrize(
    ("fault", "gap_s"), [({"resets_after": 3}, PATIENCE_S), ({"stops_after": 3}, 1.0)]
)
def test_a_stream_that_breaks_off_raises(client, upstream, fault):
    upstream.script = [Say(*"abcdef", **fault)]
    got = []
    stream = client.chat.completions.create(model="asap", messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError):
        got.extend(stream)


async def test_leaving_a_stream_ends_the_generation(client, upstream):
    upstream.script = [Say(*["a"] * 10_000, gap_s=0.1)]
    with client.chat.completions.create(model="asap", messages=MESSAGES, stream=True) as stream:
        next(iter(stream))
    await until(lambda: upstream.cancelled)
