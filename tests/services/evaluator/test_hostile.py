"""Programs that try to pass without solving, or to do harm. Each file of `hostile` says in its
first line what kind of problem it meets and which verdicts it may get; an exception with HARM is
one that did what it wanted.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from asap_evaluator.grade import grade_once
from asap_evaluator.inside.supervise import descendants
from evaluator_problems import PATIENT, PROBLEMS, SHORT
from waiting import until

pytestmark = pytest.mark.contract

PROGRAMS = sorted((Path(__file__).parent / "hostile").glob("*.txt"))


def test_there_are_enough():
    assert len(PROGRAMS) >= 35


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
async def test_gets_its_verdict_and_leaves_nothing(path, sandbox):
    program = path.read_text()
    kind, verdicts = program.partition(":")[0].removeprefix("# ").split(" ")
    before = set(descendants())
    limits = SHORT if "timeout" in verdicts else PATIENT
    grade = grade_once(program, PROBLEMS[kind], sandbox.run, limits)
    assert not grade.passed
    assert "HARM" not in grade.detail
    assert grade.verdict in verdicts.split(","), grade
    # A server of other tests may begin and end a process meanwhile; what is left over would stay.
    await until(lambda: set(descendants()) <= before)
