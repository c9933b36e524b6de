from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asap.extraction import (
    LOOP_CHARACTERS,
    LOOP_REPEATS,
    LOOP_TAIL,
    build_program,
    ends_in_loop,
    extract_code,
)
from asap.problems import Problem
from strategies import any_texts

THOUGHT = "Try\n```python\ndraft = 1\n```\n"
ANSWER = "So:\n```python\nfirst = 1\n```\nand\n```py\nlast = 2\n```\n"


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        (f"<think>{THOUGHT}</think>{ANSWER}", "last = 2", "first = 1"),
        (f"{THOUGHT}</think>{ANSWER}", "last = 2", "first = 1"),
        (THOUGHT, None, "draft = 1"),  # cut off while thinking
        (f"{THOUGHT}</think>x = 3", None, "x = 3"),
        (f"{THOUGHT}</think>a</think>{ANSWER}", None, "draft = 1"),
        (
            "</think>```cpp\nint x;\n```\nsome text\n```python\ny = 1\n```",
            "y = 1",
            "y = 1",
        ),
        ("</think>```python\nx = 1", None, "```python\nx = 1"),
        ("a</think>  \n", None, None),
        ("", None, None),
        ("a</think>```python\n\n```", None, None),
    ],
)
def test_which_block_counts(text, strict, lenient):
    assert extract_code(text, "strict") == strict
    assert extract_code(text, "lenient") == lenient


@given(any_texts, any_texts)
def test_strict_sees_nothing_of_the_thinking(thought, answer):
    code = extract_code(f"{thought}</think>{answer}", "strict")
    assert code == extract_code(f"</think>{answer}", "strict")
    assert extract_code(thought, "strict") is None


def problem(**fields):
    return Problem(
        benchmark="own",
        task_id="t",
        prompt="p",
        kind="asserts",
        entry_point="f",
        test="def check(f): ...",
        time_limit_s=1,
        **fields,
    )


def test_only_missing_import_lines_are_added():
    asked = problem(imports=("import math", "from typing import List"))
    code = "from typing import List\ndef f(x: List[int]): return math.pi"
    assert build_program(asked, code) == "import math\n\n" + code
    assert build_program(asked, code, add_imports=False) == code


def test_an_import_within_a_function_is_not_there_for_others():
    asked = problem(imports=("import math",))
    code = "def g():\n    import math\n    return 0\ndef f(): return math.pi"
    assert build_program(asked, code) == "import math\n\n" + code


def test_the_prelude_stands_first_and_future_lines_before_it():
    asked = problem(prelude="inf = float('inf')")
    program = build_program(asked, "from __future__ import annotations\ndef f(): return inf")
    space: dict[str, object] = {}
    exec(compile(program, "program", "exec"), space)
    assert space["f"]() == float("inf")
    assert program.startswith("from __future__ import annotations\ninf =")


def test_loops_are_seen_at_the_end():
    assert ends_in_loop("I start. " + "Wait, no. " * 40)
    assert ends_in_loop("I start. " + "Wait, no. " * 40 + "Wait, n")
    assert ends_in_loop("x" * 300)
    assert not ends_in_loop("Wait, no. " * 40 + "So the answer is the sum of both of them.")
    assert not ends_in_loop("Wait, no. " * 5)
    assert not ends_in_loop("".join(chr(97 + i * i % 23) + str(i) for i in range(2000)))


@given(st.text("ab", min_size=1, max_size=50), st.text("abc", max_size=80))
def test_any_text_four_times_over_enough_characters_is_a_loop(unit, start):
    repeats = max(4, -(-200 // len(unit)))
    assert ends_in_loop(start + unit * repeats)


def is_loop_by_definition(text):
    tail = text.rstrip()[-LOOP_TAIL:]
    for period in range(1, len(tail) // LOOP_REPEATS + 1):
        end = tail[-max(LOOP_REPEATS * period, LOOP_CHARACTERS) :]
        if len(end) >= LOOP_CHARACTERS and end[period:] == end[:-period]:
            return True
    return False


@given(
    start=st.text("ab ", max_size=60),
    repeated=st.text("abc\n", min_size=1, max_size=80),
    times=st.integers(1, 240),
    cut=st.integers(0, 80),
    flaw=st.none() | st.integers(0, 400),
)
def test_a_loop_is_what_the_definition_says(start, repeated, times, cut, flaw):
    text = start + repeated * times + repeated[:cut]
    if flaw is not None:
        text = text[: -flaw - 1] + "Z" + text[len(text) - flaw :]
    assert ends_in_loop(text) == is_loop_by_definition(text)
