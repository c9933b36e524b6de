from __future__ import annotations

import pytest

from asap.problems import Problem, StdinCase
from asap_evaluator.grade import grade_once, limits_for, same_output
from asap_evaluator.isolation import Limits, Outcome
from evaluator_problems import CALL, PATIENT, PROBLEMS, RIGHT, STDIN, asserts_problem

READS = "a, b = map(int, input().split())\nprint(a + b)"
CHAIN = """
class Node:
    def __init__(self, val=0, next=None):
        self.val, self.next = val, next
"""


def outcome(**fields):
    values = dict(
        exit_code=0, stop=None, stdout=b"", stderr=b"", report=b"", seconds=0.1, cpu_s=0.1,
        memory_bytes=1,
    )  # fmt: skip
    return Outcome(**{**values, **fields})


def scripted(*outcomes):
    """Runs whose outcomes are known; the pipes meant for programs are closed as a run would."""
    import os

    def run(programs, limits):
        for fd in {fd for program in programs for fd in program.pipes}:
            os.close(fd)
        return list(outcomes)

    return run


@pytest.mark.contract
@pytest.mark.parametrize(
    ("kind", "program"), [("asserts", RIGHT), ("call", RIGHT), ("stdin", READS)]
)
def test_a_right_program_passes(sandbox, kind, program):
    grade = grade_once(program, PROBLEMS[kind], sandbox.run, PATIENT)
    assert grade.verdict == "passed", grade
    assert grade.cpu_s > 0
    assert grade.flags == ()


@pytest.mark.contract
@pytest.mark.parametrize(
    ("program", "verdict"),
    [
        ("def add(a, b):\n    return a - b if a == 1 else a + b", "wrong"),
        ("def add(a, b):\n    raise ValueError(a)", "exception"),
        ("def plus(a, b):\n    return a + b", "exception"),
        ("import nothing", "exception"),
        ("def add(a, b):\n    return a +", "exception"),
        ("def add(a, b):\n    raise MemoryError", "memory"),
        ("def add(a, b):\n    while 1: pass", "timeout"),
    ],
)
@pytest.mark.parametrize("kind", ["asserts", "call"])
def test_each_failure_has_its_verdict(namespaces, kind, program, verdict):
    assert grade_once(program, PROBLEMS[kind], namespaces.run, PATIENT).verdict == verdict


@pytest.mark.contract
@pytest.mark.parametrize(
    ("program", "verdict"),
    [
        ("print(3)", "wrong"),
        ("print(int(input()))", "exception"),
        (READS + "\nraise SystemExit(3)", "exception"),
        (READS + "\nraise SystemExit(0)", "passed"),
        ("raise MemoryError", "memory"),
    ],
)
def test_programs_that_read_and_print(namespaces, program, verdict):
    assert grade_once(program, STDIN, namespaces.run, PATIENT).verdict == verdict


@pytest.mark.contract
def test_arguments_changed_by_the_program_are_changed_for_the_tests(namespaces):
    test = """
def check(candidate):
    a = [3, 1]
    assert candidate(a) is None
    assert a == [1, 3]
"""
    problem = asserts_problem(test=test, reference=None)
    good, bad = "def add(a):\n    a.sort()", "def add(a):\n    sorted(a)"
    assert grade_once(good, problem, namespaces.run, PATIENT).passed
    assert grade_once(bad, problem, namespaces.run, PATIENT).verdict == "wrong"


@pytest.mark.contract
def test_objects_of_the_prelude_travel_both_ways(namespaces):
    test = """
def check(candidate):
    head = candidate(Node(1, Node(2)))
    assert isinstance(head, Node) and (head.val, head.next.val, head.next.next) == (2, 1, None)
"""
    problem = asserts_problem(prelude=CHAIN, test=test, reference=None)
    program = """
def add(head):
    back = None
    while head:
        back, head.next, head = head, back, head.next
    return back
"""
    grade = grade_once(program, problem, namespaces.run, PATIENT)
    assert grade.passed, grade


@pytest.mark.contract
def test_tests_may_expect_exceptions_and_use_helpers_and_the_own_name(namespaces):
    test = """
def check(candidate):
    try:
        candidate(None)
    except TypeError:
        pass
    else:
        assert False
    assert add(2) == helper(2)
"""
    reference = "def helper(n): return n + 1\ndef add(n): return 0"
    problem = asserts_problem(test=test, reference=reference)
    grade = grade_once("def add(n): return n + 1", problem, namespaces.run, PATIENT)
    assert grade.passed, grade


@pytest.mark.contract
def test_an_exception_cannot_end_the_loop_of_a_test_early(namespaces):
    """StopIteration from within `map` would say that there are no more cases."""
    test = """
def check(candidate):
    for result, expected in zip(map(candidate, [1, 2]), [2, 3]):
        assert result == expected
"""
    problem = asserts_problem(test=test, reference=None)
    forged = "class Done(StopIteration): pass\ndef add(n): raise Done"
    assert grade_once(forged, problem, namespaces.run, PATIENT).verdict == "exception"
    assert grade_once("def add(n): return n + 1", problem, namespaces.run, PATIENT).passed


@pytest.mark.contract
def test_numbers_of_other_kinds_are_numbers(namespaces):
    problem = asserts_problem(test="def check(candidate): assert candidate(6) == 3 != candidate(5)")
    for half in (
        "from decimal import Decimal\ndef add(n): return Decimal(n) / 2",
        "from fractions import Fraction\ndef add(n): return Fraction(n, 2)",
    ):
        grade = grade_once(half, problem, namespaces.run, PATIENT)
        assert grade.passed, grade


@pytest.mark.contract
def test_a_function_may_have_the_name_of_its_test(namespaces):
    test = "def check(candidate):\n    assert candidate(2) == 3\n"
    problem = asserts_problem(test=test, entry_point="check", reference="def check(n): return 0")
    assert grade_once("def check(n): return n + 1", problem, namespaces.run, PATIENT).passed
    wrong = grade_once("def check(n): return n", problem, namespaces.run, PATIENT)
    assert wrong.verdict == "wrong"


@pytest.mark.contract
def test_an_output_as_long_as_the_expected_one_is_no_flood(namespaces):
    output = "\n".join(map(str, range(200_000)))
    problem = STDIN.model_copy(update={"streams": (StdinCase(input="", output=output),)})
    right = "for n in range(200_000): print(n)"
    assert len(output) > 2**20
    assert grade_once(right, problem, namespaces.run, PATIENT).passed
    flood = grade_once("while True: print(1)", problem, namespaces.run, PATIENT)
    assert flood.verdict == "output-limit"


@pytest.mark.contract
def test_a_test_that_calls_nothing_proves_nothing(namespaces):
    problem = asserts_problem(test="def check(candidate): pass")
    assert grade_once(RIGHT, problem, namespaces.run, PATIENT).verdict == "wrong"


@pytest.mark.contract
def test_tests_that_do_not_load_are_no_failure_of_the_program(namespaces):
    problem = asserts_problem(reference="import not_installed")
    assert grade_once(RIGHT, problem, namespaces.run, PATIENT).verdict == "sandbox-trouble"


@pytest.mark.parametrize("code", [None, "", "  \n", "# nothing"])
def test_no_code_is_not_run(code):
    assert grade_once(code, CALL, scripted(), PATIENT).verdict == "no-code"


@pytest.mark.parametrize(
    "report",
    [
        b"",
        b'{"nonce": "0", "outcome": "passed", "detail": ""}\n',
        b'{"outcome": "passed", "detail": ""}\n',
        b"[]\n",
        b"passed\n",
        b'{"nonce": "0"',
        b'{"nonce": "0", "outcome": "passed", "detail": ""}\n' * 2,
    ],
)
def test_a_report_without_the_nonce_never_passes(report):
    run = scripted(outcome(report=report), outcome())
    assert not grade_once(RIGHT, PROBLEMS["asserts"], run, PATIENT).passed


@pytest.mark.parametrize(
    ("own", "verdict"),
    [
        ({"trouble": "no sandbox"}, "sandbox-trouble"),
        ({"stop": "wall"}, "timeout"),
        ({"stop": "memory"}, "memory"),
        ({"stop": "output"}, "output-limit"),
        ({"exit_code": 152}, "timeout"),
        ({"exit_code": 137, "cpu_s": 1.2}, "timeout"),
        ({"exit_code": 137, "cpu_s": 0.2}, "memory"),
    ],
)
def test_limits_have_their_verdicts_before_anything_is_compared(own, verdict):
    run = scripted(outcome(report=b'{"value": 3}\n', stdout=b"3\n", **own))
    for problem in (CALL, STDIN):
        assert grade_once(RIGHT, problem, run, PATIENT).verdict == verdict


def test_risky_names_are_flagged_and_not_failed():
    run = scripted(outcome(stdout=b"3\n"))
    problem = STDIN.model_copy(update={"streams": STDIN.streams[:1]})
    grade = grade_once("import gc\nprint(3)", problem, run, PATIENT)
    assert grade.passed
    assert grade.flags == ("uses:gc",)


def test_limits_follow_the_problem():
    assert limits_for(CALL, Limits()).cpu_s == 5
    slow = Problem.model_validate({**CALL.model_dump(), "time_limit_s": 8.5})
    limits = limits_for(slow, Limits(memory_bytes=1))
    assert (limits.cpu_s, limits.wall_s, limits.memory_bytes) == (9, 23.0, 1)


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ("1 2\n", "1 2", True),
        (" 1 2 \n\n", "1 2", True),
        ("1.0", "1", True),
        ("1 2", "1  2.00", True),
        ("1.0000001", "1", False),
        ("nan", "nan", True),
        ("NaN", "1", False),
        ("sNaN", "1", False),
        ("1 snan", "1 2", False),
        ("Yes", "YES", False),
        ("1\n2", "1 2", False),
        ("", "1", False),
        ("1\n1", "1", False),
    ],
)
def test_output_is_compared_line_by_line(output, expected, same):
    assert same_output(output, expected) is same
