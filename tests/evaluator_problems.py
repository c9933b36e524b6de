"""Problems and sandboxes that several test files use."""

from __future__ import annotations

from asap.problems import CallCase, Problem, StdinCase
from asap_evaluator.isolation import Limits

SHORT = Limits(cpu_s=1, wall_s=3.0)
PATIENT = Limits(cpu_s=1, wall_s=60.0)
"""For programs that end by themselves or by what they take: a busy machine lets them wait."""
TEST = """
def check(candidate):
    assert candidate(1, 2) == 3, "MARKER-EXPECTED"
    assert candidate([1], [2]) == [1, 2]
"""
RIGHT = "def add(a, b):\n    return a + b"
COMMON = {"benchmark": "own", "task_id": "add", "prompt": "Add.", "time_limit_s": 1.0}


def asserts_problem(**fields: object) -> Problem:
    values = {"kind": "asserts", "entry_point": "add", "test": TEST, "reference": RIGHT, **fields}
    return Problem.model_validate({**COMMON, **values})


CALL = Problem(
    **COMMON,
    kind="call",
    entry_point="add",
    calls=(CallCase(args=(1, 2), expected=3), CallCase(args=([1], [2]), expected=[1, 2])),
)
STDIN = Problem(
    **COMMON,
    kind="stdin",
    streams=(StdinCase(input="1 2\n", output="3\n"), StdinCase(input="4 5\n", output="9\n")),
)
PROBLEMS = {"asserts": asserts_problem(), "call": CALL, "stdin": STDIN}
