"""Programs that try to pass without solving, or to do harm. Each file of `hostile` says in its
first line what kind of problem it meets and which verdicts it may get; an exception with HARM is
one that did what it wanted.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from asap_evaluator.grade import grade_once
from asap_evaluator.inside.supervise import descendants
from evaluator_problems import PATIENT, PROBLEMS, SHORT
from waiting import until

pytestmark = pytest.mark.contract

LATE = replace(SHORT, wall_s=PATIENT.wall_s)
UNHURRIED = replace(PATIENT, cpu_s=30)
"""On a slow processor, too, it is not time that ends them."""
PROGRAMS = sorted((Path(__file__).parent / "hostile").glob("*.txt"))


def test_there_are_enough():
    assert len(PROGRAMS) >= 35


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
async def test_gets_its_verdict_and_leaves_nothing(path, sandbox):
    program = path.read_text()
    kind, verdicts = program.partition(":")[0].removeprefix("# ").split(" ")
    before = set(descendants())
    for limits in [SHORT, LATE] if "timeout" in verdicts else [UNHURRIED]:
        grade = grade_once(program, PROBLEMS[kind], sandbox.run, limits)
        if grade.scored:
            break  # else the machine was too busy to open the sandbox in so short a time
    assert not grade.passed
    assert "HARM" not in grade.detail
    assert grade.verdict in verdicts.split(","), grade
    # A server of other tests may begin and end a process meanwhile; what is left over would stay.
    await until(lambda: set(descendants()) <= before)
