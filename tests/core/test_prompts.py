from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asap.prompts import (
    answer_in_prompt,
    clean_reply,
    coarse_prompt,
    direct_prompt,
    parse_selection,
    select_prompt,
)


def test_inserted_text_gets_a_longer_fence_than_it_holds():
    prompt = direct_prompt("Q with\n```\ncode\n```", "x = 1")
    assert "````\nQ with\n```\ncode\n```\n````" in prompt
    assert "```\nQ with\n```\ncode" in direct_prompt(
        "Q with\n```\ncode\n```", "x", fence_safety=False
    )


def test_inserted_text_is_never_read_as_a_slot():
    prompt = coarse_prompt("```\n{solution}\n```", "the {think} solution")
    assert prompt.count("the {think} solution") == 1
    assert "{solution}" in prompt


def test_an_answer_without_code_is_shown_as_text():
    assert "```python" not in direct_prompt("Q", "The answer is 4.", code=False)


def test_select_numbers_the_steps_from_one():
    prompt = select_prompt(["first", "second"], "S")
    assert "[1] first\n\n[2] second" in prompt


@pytest.mark.parametrize(
    ("answer", "last", "first"),
    [
        ("```cpp\nint x;\n```\nsome text\n```python\nx = 1\n```", "x = 1", "x = 1"),
        ("```py\na\n```\nthen\n```\nb\n```", "b", "a"),
        ("no code", None, None),
        ("```python\nnever closed", None, None),
    ],
)
def test_the_answer_is_its_last_or_first_python_block(answer, last, first):
    assert answer_in_prompt(answer, "last") == last
    assert answer_in_prompt(answer, "first") == first


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ("\n```\na\n\nb\n```\n", "a\n\nb"),
        ("```text\na\n```", "a"),
        ("```python\nx\n```\n\nand thinking", "```python\nx\n```\n\nand thinking"),
        ("  a ", "a"),
    ],
)
def test_a_fence_around_the_whole_reply_is_taken_off(reply, text):
    assert clean_reply(reply) == text


@pytest.mark.parametrize(
    ("reply", "numbers"),
    [
        ('{"keep": [1, 3]}', [1, 3]),
        ('```json\n{"keep": [3, 1, 1]}\n```', [1, 3]),
        ('I keep these steps: {"keep": [2]} because', [2]),
        ("keep: [1, 2-4]", [1, 2, 3, 4]),
        ('{"keep": ["1", "3-5"]}', [1, 3, 4, 5]),
        ("[2, 4]", [2, 4]),
        ('{"keep": []}', None),
        ('{"keep": [0]}', None),
        ('{"keep": [6]}', None),
        ('{"keep": [-1]}', None),
        ('{"keep": [1.5]}', None),
        ('{"keep": "all"}', None),
        ('{"keep": ["1-99999999999999"]}', None),
        ('{"keep": [1, 2', None),
        ("", None),
        ("keep everything", None),
        ('{"drop": [1]}', None),
        ("[[1, 2]]", None),
    ],
)
def test_selection_replies_are_read_tolerantly_and_never_guessed(reply, numbers):
    assert parse_selection(reply, 5) == numbers


@given(st.text(max_size=60))
def test_any_reply_gives_valid_numbers_or_none(reply):
    numbers = parse_selection(reply, 4)
    assert numbers is None or (numbers == sorted(set(numbers)) and set(numbers) <= {1, 2, 3, 4})


@given(st.sets(st.integers(1, 50), min_size=1))
def test_the_asked_form_is_read_exactly(kept):
    assert parse_selection(json.dumps({"keep": sorted(kept)}), 50) == sorted(kept)
