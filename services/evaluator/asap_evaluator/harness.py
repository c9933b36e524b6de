"""The programs that run inside sandboxes, put together from the modules of `inside` as one script
each, and what they are told.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Literal

from asap.extraction import build_program
from asap.problems import Problem

__all__ = ["call_setup", "judge_setup", "program_setup", "script"]


@cache
def script(role: Literal["candidate", "judge"]) -> str:
    """The whole text of a role's program."""
    parts = [
        resources.files("asap_evaluator.inside").joinpath(f"{name}.py").read_text(encoding="utf-8")
        for name in ("codec", role)
    ]
    lines = [
        line
        for part in parts
        for line in part.splitlines()
        if not line.startswith(("from __future__", "from asap_evaluator"))
    ]
    start = ["from __future__ import annotations", *lines, "main(*sys.argv[1:])", ""]
    return "\n".join(start)


def program_setup(problem: Problem, program: str) -> bytes:
    """For a candidate that answers calls: no test, no expected value, no reference."""
    return _json(program=program, entry_point=problem.entry_point)


def call_setup(problem: Problem, program: str, number: int) -> bytes:
    """For a candidate that makes one call: its arguments alone."""
    args = problem.calls[number].args
    return _json(program=program, entry_point=problem.entry_point, args=args)


def judge_setup(problem: Problem, nonce: str) -> bytes:
    """For the judge. Tests use helpers that the prompt defines; the reference brings them along."""
    return _json(
        helpers=build_program(problem, problem.reference or ""),
        test=problem.test,
        entry_point=problem.entry_point,
        nonce=nonce,
    )


def _json(**fields: object) -> bytes:
    return json.dumps(fields).encode()
