from __future__ import annotations

import pytest

from asap.errors import InvalidInput
from asap.thinking import CONTROL_TOKENS, check_control_tokens, parse_generation, render_target


def test_splits_a_generation_into_thinking_and_answer():
    assert parse_generation("<think>\nfirst\n\nsecond\n</think>\n\nanswer\n") == (
        "first\n\nsecond",
        "answer",
    )


def test_accepts_a_missing_opening_tag_only_when_asked():
    assert parse_generation("thinking</think>answer", implicit_open=True) == ("thinking", "answer")
    with pytest.raises(InvalidInput, match="0 <think>"):
        parse_generation("thinking</think>answer")


@pytest.mark.parametrize(
    "text",
    [
        "<think>a</think>b</think>c",
        "<think>a<think>b</think>c",
        "</think>a<think>b",
        "no tags at all",
        "<think>never closed",
        "preamble <think>a</think>b",
        "a</think>b</think>c",
    ],
)
def test_refuses_malformed_tags(text):
    with pytest.raises(InvalidInput) as caught:
        parse_generation(text, implicit_open=True)
    assert caught.value.problem_code == "malformed-think"


def test_target_text_is_thinking_then_answer_and_parses_back():
    target = render_target("a\n\nb", "answer")
    assert target == "<think>\na\n\nb\n</think>\nanswer"
    assert parse_generation(target) == ("a\n\nb", "answer")


@pytest.mark.parametrize("token", CONTROL_TOKENS)
def test_refuses_every_control_token_and_names_the_field(token):
    with pytest.raises(InvalidInput, match="'question'") as caught:
        check_control_tokens("question", f"x {token} y")
    assert caught.value.problem_code == "control-token-in-text"


def test_text_that_looks_like_a_token_passes():
    check_control_tokens("question", "print <|x|> and <|1|2|>")
