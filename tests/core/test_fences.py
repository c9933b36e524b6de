from __future__ import annotations

import time

import pytest

from asap.fences import code_blocks, find_fences, unwrap, wrap
from waiting import PATIENCE_S


def test_finds_closed_fences_and_leaves_unclosed_ones_as_text():
    lines = ["```python", "x", "```", "~~~", "y", "```", "~~~~", "```unclosed", "z"]
    assert [(f.start, f.end, f.info) for f in find_fences(lines)] == [(0, 2, "python"), (3, 6, "")]


def test_a_closing_line_is_as_long_as_its_opening_and_holds_nothing_else():
    assert find_fences(["````", "```", "````x", "````"])[0].end == 3


def test_an_inline_run_of_backticks_opens_nothing():
    assert find_fences(["```x``` is inline", "text", "```"]) == []


def test_many_unclosed_fences_stay_linear():
    started = time.perf_counter()
    assert find_fences(["```python"] * 20_000) == []
    assert time.perf_counter() - started < PATIENCE_S  # quadratic search takes minutes


@pytest.mark.parametrize("info", ["", "python", "py", "Python3", "PY title=x"])
def test_python_info_strings_are_accepted(info):
    assert code_blocks(f"text\n```{info}\nx = 1\n```\n") == ["x = 1"]


def test_a_cpp_block_before_the_python_block_is_skipped_and_prose_between_is_no_code():
    # the authors' regular expression takes "some text" here
    text = "```cpp\nint x;\n```\nsome text\n```python\nx = 1\n```"
    assert code_blocks(text) == ["x = 1"]


def test_a_block_inside_a_list_loses_the_indent_of_its_fence():
    assert code_blocks("1. do\n   ```python\n   if x:\n       y()\n   ```") == ["if x:\n    y()"]


def test_wrap_uses_a_longer_fence_than_the_text_holds_and_unwrap_undoes_it():
    text = "a\n````\nb\n````"
    assert wrap(text, "python").startswith("`````python\n")
    assert unwrap(wrap(text, "text")) == text


def test_unwrap_keeps_a_text_that_only_begins_with_a_fence():
    text = "```python\nx\n```\nand so on"
    assert unwrap(f"\n{text}\n") == text
