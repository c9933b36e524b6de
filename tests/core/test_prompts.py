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


def test_prompts_of_one_trace_begin_alike_whatever_its_anchor():
    steps = ["first", "second"]
    one, two = select_prompt(steps, "A solution"), select_prompt(steps, "Another solution")
    assert one.index("[2] second") < one.index("A solution")
    assert one[: one.index("A solution")] == two[: two.index("Another solution")]


def test_a_part_of_the_steps_keeps_their_numbers_and_says_so():
    prompt = select_prompt(["seventh", "eighth"], "S", first=7, total=9)
    assert "[7] seventh\n\n[8] eighth" in prompt
    assert "steps 7 to 8 of 9" in prompt


def test_only_a_part_may_be_empty():
    assert parse_selection('{"keep": []}', 8, first=7, may_be_empty=True) == []
    assert parse_selection("{}", 8, first=7, may_be_empty=True) is None
    assert parse_selection("nothing", 8, first=7, may_be_empty=True) is None
    assert parse_selection('{"keep": [7]}', 8, first=7, may_be_empty=True) == [7]
    assert parse_selection('{"keep": [6]}', 8, first=7, may_be_empty=True) is None


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
        ('{"keep": [' + "1" * 5000 + "]}", None),
        ('{"keep": ["' + "1" * 5000 + '"]}', None),
        ("[" * 100_000 + "]" * 100_000, None),
    ],
    ids=lambda value: str(value)[:30],
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
