"""Grades in a bounded pool: as many runs at once as there are cores, second tries where the machine
and not the program may be at fault.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import replace

from asap.grades import Grade
from asap.problems import Problem
from asap_evaluator.grade import grade_once, limits_for
from asap_evaluator.isolation import Limits
from asap_evaluator.sandbox import Sandbox, physical_cores

__all__ = ["Grader"]

TROUBLE_TRIES = 3
PAUSE_S = 0.2
REFERENCE_SHARE = 10
"""CPU seconds that a program may use for each of the reference's."""
LONGEST_CPU_S = 120
"""No more, however slow the reference."""


class Grader:
    """Grades programs with one sandbox. `counts`: how many grades of each verdict, of `flipped`,
    `repeated` and `retried`.
    """

    def __init__(self, sandbox: Sandbox, *, concurrency: int | None = None) -> None:
        self.sandbox = sandbox
        self.concurrency = concurrency or physical_cores()
        self.counts: Counter[str] = Counter()
        self._slots = asyncio.Semaphore(self.concurrency)
        self._alone = asyncio.Lock()
        self._threads = ThreadPoolExecutor(self.concurrency, thread_name_prefix="grade")
        self._reference_cpu_s: dict[str, float] = {}

    async def grade(self, code: str | None, problem: Problem, *, add_imports: bool = True) -> Grade:
        """The grade of a completion's code, None where it had none.

        A time-out is run once more, alone on the machine and with at least ten times the
        reference's own CPU time; what that says counts. Trouble of the sandbox is tried three
        times, then the grade is `sandbox-trouble`, which scores nothing.
        """
        limits = limits_for(problem, self.sandbox.limits)
        async with self._slots:
            grade = await self._tried(code, problem, limits, add_imports)
        if grade.verdict == "timeout":
            grade = await self._repeated(code, problem, limits, add_imports)
        self.counts[grade.verdict] += 1
        self.counts.update(flag for flag in grade.flags if not flag.startswith("uses:"))
        return grade

    def close(self) -> None:
        """End the pool; waits for runs that are under way."""
        self._threads.shutdown()

    async def _tried(
        self, code: str | None, problem: Problem, limits: Limits, add_imports: bool
    ) -> Grade:
        loop, run = asyncio.get_running_loop(), self.sandbox.run
        for attempt in range(TROUBLE_TRIES):
            if attempt:
                await asyncio.sleep(PAUSE_S * attempt)
            grade = await loop.run_in_executor(
                self._threads,
                lambda: grade_once(code, problem, run, limits, add_imports=add_imports),
            )
            if grade.scored:
                break
        return _flagged(grade, "retried") if attempt else grade

    async def _repeated(
        self, code: str | None, problem: Problem, limits: Limits, add_imports: bool
    ) -> Grade:
        async with self._alone, AsyncExitStack() as held:
            for _ in range(self.concurrency):
                await held.enter_async_context(self._slots)
            cpu_s = await self._allowance(problem, limits)
            limits = replace(limits, cpu_s=cpu_s, wall_s=2.0 * cpu_s + 5.0)
            grade = await self._tried(code, problem, limits, add_imports)
        flipped = ("flipped",) if grade.verdict != "timeout" else ()
        return _flagged(grade, "repeated", *flipped)

    async def _allowance(self, problem: Problem, limits: Limits) -> int:
        """CPU seconds for a program, from the reference's, which is measured once."""
        if problem.reference is None:
            return limits.cpu_s
        key = problem.sha256
        if key not in self._reference_cpu_s:
            generous = replace(limits, cpu_s=LONGEST_CPU_S, wall_s=2.0 * LONGEST_CPU_S)
            grade = await self._tried(problem.reference, problem, generous, True)
            self._reference_cpu_s[key] = grade.cpu_s if grade.passed else 0.0
        wanted = math.ceil(REFERENCE_SHARE * self._reference_cpu_s[key])
        return min(LONGEST_CPU_S, max(limits.cpu_s, wanted))


def _flagged(grade: Grade, *flags: str) -> Grade:
    return grade.model_copy(update={"flags": (*grade.flags, *flags)})
