"""The shipped demo scorer and the sample traces: complete, small, true to their card, and free."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from asap.ports import ScoreRequest
from asap.steps import join_steps, split_steps
from asap.types import Triple
from asap_runtime.demo_model import DEMO, demo_directory
from asap_surprisal.scorer import TorchScorer
from asap_surprisal.tokenization import HFTokenCounter

EXAMPLES = Path(__file__).parents[3] / "examples"
TRACES = [json.loads(line) for line in (EXAMPLES / "triples.jsonl").read_text("utf-8").splitlines()]
CARD = (demo_directory() / "README.md").read_text("utf-8")


@pytest.fixture(scope="module")
def counter() -> HFTokenCounter:
    return HFTokenCounter.load(DEMO)


def card_number(pattern: str) -> float:
    return float(re.search(pattern, CARD)[1])


def test_scores_with_no_download():
    scorer = TorchScorer.load(DEMO, device="cpu")
    trace = TRACES[0]
    steps = tuple(split_steps(trace["cot"]))
    [scored] = scorer.score_batch(
        [ScoreRequest(trace["question"], steps, ("first_token_surprisal", "first_token_entropy"))]
    )
    assert scorer.name == scorer.tokenizer_name == "demo"
    assert scored.flags == ()
    assert scored.bos == 1
    assert all(x >= 0 for x in scored.scores["first_token_surprisal"])
    assert len(set(scored.scores["first_token_surprisal"])) > len(steps) / 2


def test_ranks_a_usual_opening_below_an_odd_one():
    scorer = TorchScorer.load(DEMO, device="cpu")
    request = ScoreRequest(
        "What is 2 + 3?", ("Okay, so I add.", "Zebra."), ("first_token_surprisal",)
    )
    [scored] = scorer.score_batch([request])
    usual, odd = scored.scores["first_token_surprisal"]
    assert usual + 2 < odd


def test_is_small():
    sizes = {path.name: path.stat().st_size for path in demo_directory().glob("*.*")}
    assert sizes["model.safetensors"] < 6_000_000
    assert sum(sizes.values()) < 6_000_000


def test_transformers_reads_the_same_tokenizer(counter):
    theirs = AutoTokenizer.from_pretrained(demo_directory())
    for trace in TRACES:
        ids = counter.encode(trace["cot"]).ids
        assert theirs(trace["cot"], add_special_tokens=False)["input_ids"] == ids
    messages = [{"role": "user", "content": "2 + 3?"}]
    prompt = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "<｜begin▁of▁sentence｜><｜User｜>2 + 3?<｜Assistant｜><think>\n"


def test_chat_marks_are_single_tokens(counter):
    for mark in ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜end▁of▁sentence｜>"):
        assert counter.count(mark) == 1


def test_counts_add_up_for_any_subset_of_steps(counter):
    generator = random.Random(0)
    for trace in TRACES:
        steps = split_steps(trace["cot"])
        alone, joined = counter.count_all(steps), counter.count_all([s + "\n\n" for s in steps])
        for _ in range(10):
            kept = sorted(generator.sample(range(len(steps)), generator.randint(1, len(steps))))
            total = sum(joined[i] for i in kept[:-1]) + alone[kept[-1]]
            assert counter.count(join_steps([steps[i] for i in kept])) == total


def test_held_out_loss_is_that_of_the_card(counter):
    model = AutoModelForCausalLM.from_pretrained(demo_directory(), dtype=torch.float32).eval()
    end = Tokenizer.from_file(str(demo_directory() / "tokenizer.json")).token_to_id(
        "<｜end▁of▁sentence｜>"
    )
    total = count = 0
    for trace in (trace for trace in TRACES if f"- `{trace['id']}`" in CARD):
        text = f"{trace['question']}\n<think>\n{trace['cot']}\n</think>\n{trace['answer']}"
        ids = torch.tensor([counter.bos_id, *counter.encode(text).ids, end])[:4096]
        with torch.inference_mode():
            log_p = model(ids[None]).logits[0, :-1].log_softmax(-1)
        total -= log_p.gather(1, ids[1:, None]).sum().item()
        count += len(ids) - 1
    loss = card_number(r"held-out loss \| ([\d.]+) nats/token")
    assert count > 5000
    assert total / count == pytest.approx(loss, abs=2e-3)
    assert card_number(r"perplexity ([\d.]+)") == pytest.approx(math.exp(loss), abs=0.1)
    assert loss < card_number(r"uniform distribution, ln 4096 \| ([\d.]+)") - 3
    assert math.log(4096) == pytest.approx(card_number(r"ln 4096 \| ([\d.]+)"), abs=1e-3)


def test_examples_are_free_and_listed():
    listed = (EXAMPLES / "LICENSES.md").read_text("utf-8")
    assert len({trace["id"] for trace in TRACES}) == len(TRACES) == 48
    for trace in TRACES:
        assert trace["license"] in ("Apache-2.0", "MIT")
        owner = trace["source"].removeprefix("github:").split("@")[0]
        assert f"| `{trace['id']}` | {owner}@" in listed
    assert listed.count("| Apache-2.0 |") >= 48
    assert "CC-BY" not in listed


def test_examples_are_triples():
    fields = {"id", "question", "cot", "answer", "source", "model", "license"}
    for trace in TRACES:
        assert set(trace) == fields
        Triple(**{name: trace[name] for name in ("id", "question", "cot", "answer")}).check()
