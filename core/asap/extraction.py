"""From a completion to a program: the fenced block that counts, the code that must stand before it,
and what a completion without one looks like.
"""

from __future__ import annotations

import re

from asap.eval_config import Extraction
from asap.fences import code_blocks
from asap.problems import Problem
from asap.thinking import CLOSE

__all__ = ["build_program", "ends_in_loop", "extract_code"]

_FUTURE = re.compile(r"^from __future__ import [^\n(]+\n?", re.MULTILINE)

LOOP_TAIL, LOOP_REPEATS, LOOP_CHARACTERS = 8192, 4, 200
"""A loop: the last 200 characters or more are one text four times or more; looked for in the last
8,192.
"""
_MARK = LOOP_CHARACTERS // LOOP_REPEATS
"""A loop's text of more characters fills it four times over, so its end is at least as long."""


def extract_code(text: str, extraction: Extraction) -> str | None:
    """The program in a completion; None when there is none.

    `strict`: the last Python block after the only `</think>`, so unfinished thinking never scores.
    `lenient`: as the authors' scripts, the first Python block of that part, or of the whole text
    when there is not exactly one `</think>`; without a block that text itself.
    """
    _, tag, answer = text.partition(CLOSE)
    single = bool(tag) and CLOSE not in answer
    if extraction == "strict":
        blocks = code_blocks(answer) if single else []
        code = blocks[-1] if blocks else ""
    else:
        searched = answer if single else text
        blocks = code_blocks(searched)
        code = blocks[0] if blocks else searched
    return code if code.strip() else None


def build_program(problem: Problem, code: str, *, add_imports: bool = True) -> str:
    """The program to run: prelude, import lines of the task that `code` lacks, `code`.

    `from __future__` lines move to the top, where alone they are Python.
    """
    lines = {line.rstrip() for line in code.splitlines()}
    missing = [line for line in problem.imports if add_imports and line not in lines]
    future = "".join(_FUTURE.findall(code))
    if future and not future.endswith("\n"):
        future += "\n"
    head = "\n".join([*([problem.prelude] if problem.prelude else []), *missing])
    return f"{future}{head}\n\n{_FUTURE.sub('', code)}" if head else code


def ends_in_loop(text: str) -> bool:
    """Whether a completion ends in one text repeated over and over.

    The end of a loop stands one period before itself, so only the distances at which the last few
    characters come again are compared.
    """
    tail = text.rstrip()[-LOOP_TAIL:]
    size, mark = len(tail), tail[-_MARK:]
    if size < LOOP_CHARACTERS:
        return False
    at = size - _MARK
    while (at := tail.rfind(mark, 0, at + _MARK - 1)) >= 0:
        period = size - _MARK - at
        if period > size // LOOP_REPEATS:
            return False
        length = max(LOOP_REPEATS * period, LOOP_CHARACTERS)
        if length <= size and tail[size - length : size - period] == tail[size - length + period :]:
            return True
    return False
