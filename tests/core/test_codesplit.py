from __future__ import annotations

import pytest

from asap.codesplit import is_code, merge_code


@pytest.mark.parametrize(
    "block",
    [
        "x = 1",
        "n, m = map(int, input().split())",
        "for i in range(3):",
        "else:\n    x = 2",
        "except ValueError:\n    pass",
        "    return y",
        "print(x)",
        "arr.append(1)  # done",
        "# sort first\narr.sort()",
        "case 1:\n    x()",
    ],
)
def test_statements_are_code(block):
    assert is_code(block)


@pytest.mark.parametrize(
    "block",
    [
        "So",
        "Wait, no.",
        "Note: this",
        "So in code:",
        "x",
        "i=0: binary 000",
        "1. first",
        "",
        "# Heading",
        "```python\nx = 1\n```",
        "candidate1: -4*2*2= -16.",
        "return the list of pairs, in order.",
    ],
)
def test_prose_labels_and_fences_are_not_code(block):
    assert not is_code(block)


@pytest.mark.parametrize(
    ("blocks", "merged"),
    [
        (["def f():\n    x = 1", "    return x"], 1),  # indented continuation
        (["for i in x:", "    print(i)"], 1),  # open block
        (["xs = [1,\n    2,", "3, 4]"], 1),  # open bracket
        (["import math", "x = math.pi", "print(x)"], 1),  # statements of one program
        (["For each stick:", "   if it is new, count it.", "      else skip."], 1),  # under a colon
        (["For each stick:", "   count it.", "Then compare."], 2),
        (["Some text:", "   indented", " less"], 1),
        (["x = 1", "Wait, no.", "x = 2"], 3),
        (["Some text:", "    - an item"], 2),
        (["x = 1", "- an item"], 2),
        (["```\nx\n```", "    y = 1"], 2),
        (["x = 1", "```\ny = 1\n```"], 2),
    ],
)
def test_blocks_of_one_piece_are_joined(blocks, merged):
    assert len(merge_code(blocks, "\n\n")) == merged
