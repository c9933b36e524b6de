"""A program and a problem → Grade. A value, never an exception.

Where the proof of a pass comes from. The program runs in a sandbox that holds neither tests nor
expected values. `call` and `stdin` problems are compared here, outside. `asserts` problems bring
tests as code: they run in a second sandbox, the judge, whose calls of the function travel to the
program's sandbox and come back as plain values. Only the judge holds the nonce and the descriptor
that verdicts leave by, so there is nothing in the program's reach to forge a pass with: taking over
its own process only lets it answer other values, which is what programs do anyway.
"""

from __future__ import annotations

import ast
import json
import math
import os
import secrets
import signal
from collections.abc import Iterable, Sequence
from dataclasses import replace
from decimal import Decimal, InvalidOperation

from asap.extraction import build_program
from asap.grades import Grade, Verdict, risky_names
from asap.problems import Problem
from asap_evaluator.harness import call_setup, judge_setup, program_setup, script
from asap_evaluator.isolation import Limits, Outcome, Program, Run

__all__ = ["grade_once", "limits_for", "same_output"]

LEAST_CPU_S = 5
XCPU, KILL = 128 + signal.SIGXCPU, 128 + signal.SIGKILL
STOPS: dict[str, Verdict] = {"wall": "timeout", "memory": "memory", "output": "output-limit"}
OUTCOMES: dict[str, Verdict] = {
    "passed": "passed",
    "wrong": "wrong",
    "forged": "wrong",
    "exception": "exception",
    "memory": "memory",
    "output-limit": "output-limit",
    "unsendable": "sandbox-trouble",
}
"""What the judge says; `gone` is decided by how the program ended. An argument that cannot travel
is a limit of ours.
"""


def limits_for(problem: Problem, limits: Limits) -> Limits:
    """The limits of one run: CPU of at least 5 s, wall of twice that and 5 s."""
    cpu_s = max(LEAST_CPU_S, math.ceil(problem.time_limit_s))
    return replace(limits, cpu_s=cpu_s, wall_s=2.0 * cpu_s + 5.0)


def grade_once(
    code: str | None, problem: Problem, run: Run, limits: Limits, *, add_imports: bool = True
) -> Grade:
    """Grade the code of a completion, None where it had none, without second tries.

    `limits`: those of `limits_for`. `add_imports`: put the prompt's import lines before it.
    """
    if code is None or _is_empty(code):
        return Grade(verdict="no-code")
    program = build_program(problem, code, add_imports=add_imports)
    if problem.kind == "asserts":
        grade = _grade_asserts(program, problem, run, limits)
    else:
        grade = _grade_cases(program, problem, run, limits)
    return grade.model_copy(update={"flags": tuple(f"uses:{name}" for name in risky_names(code))})


def _is_empty(code: str) -> bool:
    try:
        return not ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return not code.strip()


def _grade_asserts(program: str, problem: Problem, run: Run, limits: Limits) -> Grade:
    nonce = secrets.token_hex(16)
    replies_read, replies_write = os.pipe()
    calls_read, calls_write = os.pipe()
    judge = Program(
        source=script("judge"),
        setup=judge_setup(problem, nonce),
        reports=True,
        pipes=(replies_read, calls_write),
    )
    candidate = Program(
        source=script("candidate"),
        setup=program_setup(problem, program),
        pipes=(replies_write, calls_read),
    )
    tests, own = run((judge, candidate), limits)
    verdict, detail = _judged(tests, own, nonce, limits)
    return _grade(verdict, detail, [own], tests.seconds)


def _judged(tests: Outcome, own: Outcome, nonce: str, limits: Limits) -> tuple[Verdict, str]:
    """The verdict of an assert-style run, from how both ended and what the judge said."""
    for outcome in (own, tests):
        ended = _ended_by_limit(outcome, limits)
        if ended:
            return ended
    said = _only_line(tests.report)
    if said is None:
        if tests.report:
            return "wrong", "a doubled or broken report"
        return "sandbox-trouble", f"the tests did not load: {_last_line(tests.stderr)}"
    if not secrets.compare_digest(str(said.get("nonce")).encode(), nonce.encode()):
        return "wrong", "a report without the nonce"
    if said.get("outcome") == "gone":
        return "wrong", f"ended before its last answer, exit code {own.exit_code}"
    return OUTCOMES[str(said["outcome"])], str(said["detail"])


def _grade_cases(program: str, problem: Problem, run: Run, limits: Limits) -> Grade:
    """Each case in a fresh sandbox; the first that is not right decides."""
    outcomes: list[Outcome] = []
    verdict: Verdict = "passed"
    detail = ""
    count = len(problem.calls or problem.streams)
    for number in range(count):
        case = _call_case if problem.kind == "call" else _stream_case
        outcome, verdict, detail = case(program, problem, number, run, limits)
        outcomes.append(outcome)
        if verdict != "passed":
            detail = f"case {number + 1}: {detail}"
            break
    return _grade(verdict, detail or f"{count} cases", outcomes, sum(o.seconds for o in outcomes))


def _call_case(
    program: str, problem: Problem, number: int, run: Run, limits: Limits
) -> tuple[Outcome, Verdict, str]:
    candidate = Program(
        source=script("candidate"), setup=call_setup(problem, program, number), reports=True
    )
    (outcome,) = run((candidate,), limits)
    ended = _ended_by_limit(outcome, limits)
    if ended:
        return outcome, *ended
    said = _only_line(outcome.report)
    if said is None:
        return outcome, "wrong", f"not one answer, exit code {outcome.exit_code}"
    if "raised" in said:
        verdict: Verdict = "memory" if said["raised"] == "MemoryError" else "exception"
        return outcome, verdict, f"{str(said.get('name'))[:80]}: {str(said.get('message'))[:200]}"
    if "value" not in said:
        return outcome, "wrong", f"result of type {str(said.get('unsendable'))[:80]}"
    return outcome, *_compared(_same_value(said["value"], problem.calls[number].expected))


def _stream_case(
    program: str, problem: Problem, number: int, run: Run, limits: Limits
) -> tuple[Outcome, Verdict, str]:
    case = problem.streams[number]
    # A right answer may be long; what is too much begins behind it.
    limits = replace(limits, output_bytes=limits.output_bytes + len(case.output.encode()))
    (outcome,) = run((Program(source=program, stdin=case.input.encode()),), limits)
    ended = _ended_by_limit(outcome, limits)
    if ended:
        return outcome, *ended
    if outcome.exit_code:
        last = _last_line(outcome.stderr)
        verdict: Verdict = "memory" if last.startswith("MemoryError") else "exception"
        return outcome, verdict, last or f"exit code {outcome.exit_code}"
    return outcome, *_compared(same_output(outcome.stdout.decode(errors="replace"), case.output))


def _compared(same: bool) -> tuple[Verdict, str]:
    return ("passed", "") if same else ("wrong", "another result than expected")


def _ended_by_limit(outcome: Outcome, limits: Limits) -> tuple[Verdict, str] | None:
    """The verdict for a run that a limit or trouble ended; None for one that ended by itself."""
    if outcome.trouble:
        return "sandbox-trouble", outcome.trouble
    if outcome.stop in STOPS:
        return STOPS[outcome.stop], f"{outcome.stop} limit"
    if outcome.stop == "done":
        return None
    if outcome.exit_code == XCPU:
        return "timeout", f"CPU limit, {limits.cpu_s} s"
    if outcome.exit_code == KILL:
        # Ours are known by `stop`: the rest is the hard CPU limit, or the kernel out of memory.
        late = outcome.cpu_s >= limits.cpu_s
        return ("timeout", "CPU limit") if late else ("memory", "killed by the system")
    return None


def _only_line(report: bytes) -> dict[str, object] | None:
    """The one object that a report must consist of."""
    if report.count(b"\n") != 1 or not report.endswith(b"\n"):
        return None
    try:
        said = json.loads(report)
    except (ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) else None


def _same_value(value: object, expected: object) -> bool:
    try:
        return value == expected
    except RecursionError:
        return False


def same_output(output: str, expected: str) -> bool:
    """Line by line without outer white space; numbers that are written differently are the same."""
    lines, wanted = output.strip().splitlines(), expected.strip().splitlines()
    return len(lines) == len(wanted) and all(map(_same_line, lines, wanted))


def _same_line(line: str, expected: str) -> bool:
    if line.strip() == expected.strip():
        return True
    numbers, wanted = _decimals(line.split()), _decimals(expected.split())
    return numbers is not None and numbers == wanted


def _decimals(words: Iterable[str]) -> list[Decimal] | None:
    try:
        numbers = [Decimal(word) for word in words]
    except InvalidOperation:
        return None
    # A signaling one raises wherever it is compared.
    return None if any(number.is_snan() for number in numbers) else numbers


def _last_line(stderr: bytes) -> str:
    lines = stderr.decode(errors="replace").strip().splitlines()
    return lines[-1][:280] if lines else ""


def _grade(verdict: Verdict, detail: str, outcomes: Sequence[Outcome], seconds: float) -> Grade:
    return Grade(
        verdict=verdict,
        detail=detail,
        seconds=seconds,
        cpu_s=sum(outcome.cpu_s for outcome in outcomes),
        memory_bytes=max((outcome.memory_bytes for outcome in outcomes), default=0),
    )
