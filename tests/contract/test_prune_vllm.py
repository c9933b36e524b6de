"""Both stages with a real LLM server and a real scorer: the replies are noise, the proof is not."""

from __future__ import annotations

import pytest

from asap.config import PruneConfig
from asap.types import Triple
from asap_anchor.chat import OpenAIChat
from asap_runtime.pipeline import prune
from asap_surprisal.scorer import TorchScorer

pytestmark = [pytest.mark.contract, pytest.mark.timeout(300)]

COT = "\n\n".join(f"Step {i} looks at the number {i} and adds it." for i in range(12))


@pytest.mark.parametrize("protocol", ["rewrite", "select"])
async def test_whatever_the_llm_says_the_result_is_a_subset_of_the_source(vllm_server, protocol):
    config = PruneConfig(
        protocol=protocol,
        max_tokens=60,
        max_attempts=3,
        max_reply_tokens=100,
        rewrite_temperature=1.0,
    )
    triples = [Triple(id=str(i), question=f"Add {i}.", cot=COT, answer="66") for i in range(4)]
    chat = OpenAIChat(base_url=vllm_server.base_url, api_key="any", model=vllm_server.model)
    records = await prune(triples, config, chat=chat, scorer=TorchScorer.load("demo", device="cpu"))
    await chat.close()
    for record in records:
        assert record.status in ("compressed", "fallback_original")
        assert record.coarse.usage.prompt_tokens > 0
        assert 1 <= len(record.coarse.attempts) <= 6
        steps = record.pruned_cot.split("\n\n")
        assert steps == [COT.split("\n\n")[i] for i in record.kept_steps]
        assert record.tokens.pruned <= 60
