from __future__ import annotations

import asyncio
import threading
import time
from contextlib import ExitStack

import pytest

from asap_evaluator.grader import Grader
from asap_evaluator.isolation import Identity, Limits, Outcome
from asap_evaluator.sandbox import Sandbox
from evaluator_problems import RIGHT, STDIN, asserts_problem
from waiting import PATIENCE_S, until

ONE = STDIN.model_copy(update={"streams": STDIN.streams[:1]})
RIGHT_OUTPUT = {"stdout": b"3\n"}
TROUBLE = {"trouble": "no sandbox"}
TIMEOUT = {"stop": "wall"}


class Scripted(Sandbox):
    """A sandbox whose runs are known beforehand; the last goes on for ever."""

    def __init__(self, *outcomes, together=1):
        super().__init__(None, Identity(), Limits(), 1.0, {}, ExitStack())
        object.__setattr__(self, "script", list(outcomes))
        object.__setattr__(self, "start", threading.Barrier(together, timeout=PATIENCE_S))
        object.__setattr__(self, "limits_seen", [])
        object.__setattr__(self, "busy", [0, 0])
        object.__setattr__(self, "seen", [])
        object.__setattr__(self, "lock", threading.Lock())

    def run(self, programs, limits):
        with self.lock:
            self.limits_seen.append(limits)
            fields = self.script.pop(0) if len(self.script) > 1 else self.script[0]
            self.busy[0] += 1
            self.busy[1] = max(self.busy)
            first = len(self.limits_seen) <= self.start.parties
        if first:  # so many are at work at once, however threads are scheduled
            self.start.wait()
        time.sleep(0.01)
        with self.lock:
            self.seen.append((limits.cpu_s, self.busy[0]))
            self.busy[0] -= 1
        values = dict(
            exit_code=0, stop=None, stdout=b"", stderr=b"", report=b"", seconds=0.1, cpu_s=0.7,
            memory_bytes=1,
        )  # fmt: skip
        return [Outcome(**{**values, **fields})]


@pytest.fixture
def graders():
    made = []

    def make(*outcomes, concurrency=2, together=1):
        made.append(Grader(Scripted(*outcomes, together=together), concurrency=concurrency))
        return made[-1]

    yield make
    for grader in made:
        grader.close()


async def test_trouble_is_tried_three_times_and_then_scores_nothing(graders):
    grader = graders(TROUBLE)
    grade = await grader.grade("print(3)", ONE)
    assert grade.verdict == "sandbox-trouble"
    assert not grade.scored
    assert len(grader.sandbox.limits_seen) == 3


async def test_trouble_that_passes_leaves_a_flag(graders):
    grader = graders(TROUBLE, RIGHT_OUTPUT)
    grade = await grader.grade("print(3)", ONE)
    assert grade.passed
    assert grade.flags == ("retried",)
    assert grader.counts == {"passed": 1, "retried": 1}


async def test_a_timeout_is_repeated_and_a_flip_is_counted(graders):
    grader = graders(TIMEOUT, RIGHT_OUTPUT)
    grade = await grader.grade("print(3)", ONE)
    assert grade.passed
    assert grade.flags == ("repeated", "flipped")
    assert grader.counts["flipped"] == 1


async def test_a_timeout_twice_is_a_timeout(graders):
    grader = graders(TIMEOUT)
    grade = await grader.grade("print(3)", ONE)
    assert (grade.verdict, grade.flags) == ("timeout", ("repeated",))
    assert grader.counts["flipped"] == 0


async def test_the_repetition_has_ten_times_the_references_time_which_is_measured_once(graders):
    slow = {**RIGHT_OUTPUT, "cpu_s": 1.25}
    grader = graders(TIMEOUT, slow, TIMEOUT, TIMEOUT, TIMEOUT)
    problem = ONE.model_copy(update={"reference": "print(3)"})
    await grader.grade("print(3)", problem)
    await grader.grade("print(3)", problem)
    assert [limits.cpu_s for limits in grader.sandbox.limits_seen] == [5, 120, 13, 5, 13]


async def test_the_repetition_is_alone(graders):
    grader = graders(TIMEOUT, RIGHT_OUTPUT, concurrency=4, together=4)
    problem = ONE.model_copy(update={"reference": "print(3)"})
    grades = await asyncio.gather(*(grader.grade("print(3)", problem) for _ in range(12)))
    assert sum("flipped" in grade.flags for grade in grades) == 1
    assert all(grade.passed for grade in grades)
    assert grader.sandbox.busy[1] == 4
    assert [busy for cpu_s, busy in grader.sandbox.seen if cpu_s > 5] == [1, 1]


async def test_a_repetition_that_is_cancelled_while_it_waits_keeps_no_place(graders):
    grader = graders(TIMEOUT, TIMEOUT, RIGHT_OUTPUT)
    async with grader._slots:  # another program runs
        repeating = asyncio.create_task(grader.grade("print(3)", ONE))
        await until(lambda: grader._alone.locked() and grader._slots.locked())
        repeating.cancel()
        await asyncio.wait([repeating])
    async with asyncio.timeout(PATIENCE_S):
        assert (await grader.grade("print(3)", ONE)).flags == ("repeated", "flipped")


async def test_no_more_at_once_than_asked_for(graders):
    grader = graders(RIGHT_OUTPUT, concurrency=2, together=2)
    await asyncio.gather(*(grader.grade("print(3)", ONE) for _ in range(10)))
    assert grader.sandbox.busy[1] == 2


@pytest.mark.contract
async def test_verdicts_are_the_same_under_full_load(sandbox):
    grader = Grader(sandbox, concurrency=4)
    wrong = "def add(a, b): return a"
    programs = [RIGHT, wrong, "def add(a, b): raise ValueError", None] * 6
    rounds = [
        [
            grade.verdict
            for grade in await asyncio.gather(
                *(grader.grade(program, asserts_problem()) for program in programs)
            )
        ]
        for _ in range(3)
    ]
    grader.close()
    assert rounds[0] == rounds[1] == rounds[2] == ["passed", "wrong", "exception", "no-code"] * 6
    assert grader.counts["sandbox-trouble"] == 0
