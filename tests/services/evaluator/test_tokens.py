from __future__ import annotations

import json

import pytest

from asap.chat_templates import template_for
from asap.errors import Misconfigured
from asap_evaluator.tokens import ModelTokens
from tiny_model import BOS, EOS


@pytest.fixture(scope="module")
def tokens(tiny_model_dir):
    return ModelTokens.load(tiny_model_dir)


def test_it_is_the_encoder_that_chat_templates_want(tokens):
    template = template_for("deepseek-r1", tokens)
    ids = tokens.encode(template.prompt("Add x.")).ids
    assert ids[0] == tokens.bos_id == tokens.token_id(BOS)
    assert ids.count(tokens.bos_id) == 1
    assert tokens.token_id("<think>") in ids
    assert tokens.token_id("two tokens") is None
    assert tokens.stop_ids == (tokens.token_id(EOS),)


@pytest.mark.parametrize(
    "text",
    [
        "So x is 3.</think>def f",
        "</think>",
        "Hmm 🙂 然后.\n\n</think>\nanswer 🙂</think>",
        "x" * 300 + "</think>" + "y" * 500,
    ],
)
def test_reasoning_tokens_are_those_before_the_first_closing_tag(tokens, text):
    ids = tokens.encode(text).ids
    before = text[: text.index("</think>")]
    assert tokens.reasoning_tokens(ids) == len(tokens.encode(before).ids)
    assert ids[tokens.reasoning_tokens(ids)] == tokens.token_id("</think>")


def test_thinking_that_never_ends_is_all_reasoning(tokens):
    ids = tokens.encode("So on and on").ids
    assert tokens.reasoning_tokens(ids) == len(ids)
    assert tokens.reasoning_tokens([]) == 0


def test_a_tag_of_several_tokens_is_found_as_well(tokens):
    """Without the tag among its tokens, as in models of other families."""
    pieces = ["So x.", "<", "/", "th", "ink", ">", "def"]
    ids = [id_ for piece in pieces for id_ in tokens.encode(piece).ids]
    assert tokens.token_id("</think>") not in ids
    assert tokens.reasoning_tokens(ids) == len(tokens.encode("So x.").ids)
    straddling = [tokens.encode("So x").ids, tokens.encode(".<").ids, tokens.encode("/think>").ids]
    first, second, third = straddling
    assert tokens.reasoning_tokens([*first, *second, *third]) >= len(first)


def test_a_model_may_end_at_several_tokens(tiny_model_dir, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_model_dir / name).read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"eos_token": {"content": EOS}, "pad_token": BOS}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokens = ModelTokens.load(tmp_path)
    assert tokens.stop_ids == tuple(sorted({7, 9, tokens.token_id(EOS), tokens.token_id(BOS)}))


@pytest.mark.parametrize("damaged", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_files_are_misconfigured(tiny_model_dir, tmp_path, damaged):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_model_dir / name).read_bytes())
    (tmp_path / damaged).write_text("{")
    with pytest.raises(Misconfigured, match=r"tokenizer\.json"):
        ModelTokens.load(tmp_path)
