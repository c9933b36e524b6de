"""OpenAIChat against a real vLLM: what the scripted server can only assume."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator

import pytest

from asap.errors import UpstreamError
from asap.ports import Sampling
from asap_anchor.cache import ReplyCache
from asap_anchor.chat import OpenAIChat

pytestmark = [pytest.mark.contract, pytest.mark.timeout(300)]

GREEDY = Sampling(temperature=0.0, max_tokens=16, seed=1)
HOT = Sampling(temperature=2.0, max_tokens=16, seed=1)
PROMPT = "Which steps of the thinking are needed?"
KEPT_STEPS = {
    "type": "object",
    # Bounded: random weights would go on counting until the reply is cut.
    "properties": {"keep": {"type": "array", "items": {"enum": [1, 2, 3, 5, 8]}, "maxItems": 4}},
    "required": ["keep"],
    "additionalProperties": False,
}


@pytest.fixture
async def chat_of(vllm_server) -> AsyncIterator:
    made: list[OpenAIChat] = []

    def make(**arguments) -> OpenAIChat:
        given = {"base_url": vllm_server.base_url, "model": vllm_server.model} | arguments
        made.append(OpenAIChat(api_key="any", **given))
        return made[-1]

    yield make
    for chat in made:
        await chat.close()


async def test_answers_and_counts_tokens(chat_of):
    chat = chat_of(price_in=1.0, price_out=2.0)

    result = await chat.complete(PROMPT, GREEDY)

    assert result.text
    assert result.usage.prompt_tokens > 0
    assert 0 < result.usage.completion_tokens <= 16
    assert result.usage.cost_usd > 0


async def test_greedy_decoding_with_one_seed_gives_one_text(chat_of):
    chat = chat_of()

    texts = {(await chat.complete(PROMPT, GREEDY)).text for _ in range(2)}

    assert len(texts) == 1


async def test_each_seed_gives_another_hot_sample(chat_of):
    chat = chat_of()

    hot = [dataclasses.replace(HOT, seed=seed) for seed in (1, 2, 1)]
    texts = [(await chat.complete(PROMPT, sampling)).text for sampling in hot]

    assert texts[0] != texts[1]
    assert texts[0] == texts[2]


async def test_a_reply_that_is_cut_says_so(chat_of):
    result = await chat_of().complete(PROMPT, dataclasses.replace(HOT, max_tokens=2))

    assert result.finish_reason == "length"
    assert result.usage.completion_tokens == 2


async def test_structured_replies_follow_the_schema(chat_of):
    chat = chat_of()

    for seed in range(4):
        wanted = dataclasses.replace(HOT, max_tokens=64, seed=seed, json_schema=KEPT_STEPS)
        result = await chat.complete(PROMPT, wanted)

        reply = json.loads(result.text)
        assert list(reply) == ["keep"]
        assert all(type(step) is int for step in reply["keep"])
        assert result.finish_reason == "stop"


async def test_an_unknown_model_is_an_upstream_error(chat_of):
    with pytest.raises(UpstreamError, match="404") as caught:
        await chat_of(model="no-such-model").complete(PROMPT, GREEDY)

    assert caught.value.context["status"] == 404
    assert not caught.value.retryable


async def test_a_prompt_beyond_the_context_is_an_upstream_error(chat_of):
    chat = chat_of()
    wanted = dataclasses.replace(HOT, max_tokens=64, json_schema=KEPT_STEPS)

    with pytest.raises(UpstreamError, match="400"):
        await chat.complete("step 1 " * 4000, wanted)

    json.loads((await chat.complete(PROMPT, wanted)).text)  # the schema is still asked for


async def test_a_cached_reply_is_identical_without_the_server(chat_of, tmp_path):
    cold = await chat_of(cache=ReplyCache(tmp_path)).complete(PROMPT, HOT)

    elsewhere = chat_of(base_url="http://127.0.0.1:9/v1", cache=ReplyCache(tmp_path))
    warm = await elsewhere.complete(PROMPT, HOT)

    assert warm == cold
    assert elsewhere.stats.calls == 0
