"""Prune a list of triples with a chat model and a scorer: the library in ten lines.

    python examples/prune_library.py https://host/v1 MODEL [SCORER]

The key of the server is read from ASAP_LLM__API_KEY.
"""

import asyncio
import json
import os
import sys
from pathlib import Path

from asap import PruneConfig, Triple
from asap_anchor.chat import OpenAIChat
from asap_runtime.pipeline import prune
from asap_surprisal.scorer import TorchScorer


async def main(base_url: str, model: str, scorer_name: str = "demo") -> None:
    lines = Path(__file__).with_name("triples.jsonl").read_text().splitlines()[:3]
    rows = [json.loads(line) for line in lines]
    triples = [Triple(**{k: row[k] for k in ("id", "question", "cot", "answer")}) for row in rows]
    key = os.environ.get("ASAP_LLM__API_KEY", "none")
    chat = OpenAIChat(base_url=base_url, model=model, api_key=key)
    scorer = TorchScorer.load(scorer_name)
    config = PruneConfig(protocol="select", max_tokens=512)
    for record in await prune(triples, config, chat=chat, scorer=scorer):
        print(record.id, record.status, record.tokens, record.kept_steps)


asyncio.run(main(*sys.argv[1:]))
