from __future__ import annotations

import ast
import re

import pytest
from hypothesis import given

from asap.fences import find_fences
from asap.steps import join_steps, split_steps
from strategies import any_texts

FENCED = "```python\ndef f(x):\n    y = x + 1\n\n    return y\n```"


def test_paper_split_cuts_fenced_code_and_loses_indentation():
    assert split_steps(FENCED, "paper") == ["```python\ndef f(x):\n    y = x + 1", "return y\n```"]


def test_safe_split_keeps_fenced_code_whole():
    assert split_steps(f"before\n\n{FENCED}\n\nafter") == ["before", FENCED, "after"]


def test_safe_split_keeps_the_indent_of_a_first_line():
    assert split_steps("if x:\n\n    y = 1") == ["if x:", "    y = 1"]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("a\r\n\r\nb\rc", ["a", "b\nc"]),
        ("a\n \t\nb", ["a", "b"]),
        ("a\n\u00a0\nb", ["a\n\u00a0\nb"]),
        ("\n\n\na\n\n\n\nb\n\n", ["a", "b"]),
        ("~~~\na\n\nb\n~~~\n\nc", ["~~~\na\n\nb\n~~~", "c"]),
        ("- item\n  ```\n  a\n\n  b\n  ```", ["- item\n  ```\n  a\n\n  b\n  ```"]),
        ("```\nnever closed\n\nb\n\nc", ["```\nnever closed", "b", "c"]),
        ("", []),
        (" \n\t\n", []),
    ],
)
def test_safe_split_of_awkward_texts(text, steps):
    assert split_steps(text) == steps


@pytest.mark.parametrize("split", ["safe", "code", "paper"])
@given(text=any_texts)
def test_splitting_what_was_joined_gives_the_same_steps(split, text):
    steps = split_steps(text, split)
    assert split_steps(join_steps(steps), split) == steps
    assert all(step.strip(" \t\n") for step in steps)


@given(text=any_texts)
def test_no_safe_step_holds_a_blank_line_outside_a_fence(text):
    for step in split_steps(text):
        lines = step.split("\n")
        inside = {i for fence in find_fences(lines) for i in range(fence.start, fence.end + 1)}
        assert all(i in inside or line.strip(" \t") for i, line in enumerate(lines))


@given(text=any_texts)
def test_safe_split_loses_nothing_but_blank_lines(text):
    normal = text.replace("\r\n", "\n").replace("\r", "\n")
    joined = join_steps(split_steps(text))
    assert re.sub(r"[ \t\n]+", " ", joined).strip() == re.sub(r"[ \t\n]+", " ", normal).strip()


@given(text=any_texts)
def test_code_split_only_joins_safe_steps(text):
    assert join_steps(split_steps(text, "code")) == join_steps(split_steps(text))


def test_code_split_joins_one_function_over_blank_lines():
    code = "def f(xs):\n    total = 0\n\n    for x in xs:\n        total += x\n\n    return total"
    assert split_steps(f"So in code:\n\n{code}\n\nThat should do it.", "code") == [
        "So in code:",
        code,
        "That should do it.",
    ]


def test_real_traces_keep_their_text_and_code_in_one_piece(real_traces):
    cut = kept_whole = 0
    for trace in real_traces:
        safe, code = split_steps(trace["cot"]), split_steps(trace["cot"], "code")
        assert join_steps(code) == join_steps(safe)
        kept_whole += sum(_is_module(step) for step in code)
        cut += sum(_is_module(step) for step in safe)
    assert kept_whole > cut


def _is_module(step: str) -> bool:
    try:
        return "\n" in step and any(isinstance(n, ast.FunctionDef) for n in ast.parse(step).body)
    except (SyntaxError, ValueError):
        return False
