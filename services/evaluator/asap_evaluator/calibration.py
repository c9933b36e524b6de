"""Whether this machine is fast enough for verdicts under a CPU limit: a fixed program against the
reference.
"""

from __future__ import annotations

from asap.errors import CapacityError
from asap_evaluator.isolation import Limits, Program, Run

__all__ = ["LEAST_SPEED", "REFERENCE_CPU_S", "calibrate"]

REFERENCE_CPU_S = 0.20
"""CPU seconds of the program below on the machine of our measurements."""
LEAST_SPEED = 0.25
"""Share of the reference speed below which programs would time out for the machine's sake."""
TRIES = 3

PROGRAM = """
import time
began = time.process_time()
primes = [n for n in range(2, 60_000) if all(n % d for d in range(2, int(n**0.5) + 1))]
words = {str(n): n for n in range(300_000)}
total = sum(words[str(n)] * n for n in range(0, 300_000, 3))
text = "".join(sorted(str(total) * 60_000))
print(time.process_time() - began)
"""
"""Integers, a dictionary, strings and sorting: what graded programs do."""


def calibrate(
    run: Run,
    limits: Limits,
    *,
    reference_cpu_s: float = REFERENCE_CPU_S,
) -> float:
    """The sandbox's speed as a share of the reference machine's, the best of three.

    Raises CapacityError `sandbox-unavailable` below a quarter.
    """
    seconds = []
    for _ in range(TRIES):
        (outcome,) = run((Program(source=PROGRAM),), limits)
        if outcome.trouble or outcome.exit_code:
            raise CapacityError(
                f"the calibration program did not run: {outcome.trouble or outcome.exit_code}",
                code="sandbox-unavailable",
            )
        seconds.append(float(outcome.stdout))
    speed = reference_cpu_s / min(seconds)
    if speed < LEAST_SPEED:
        raise CapacityError(
            f"programs run at {speed:.2f} of the reference speed here, at least {LEAST_SPEED} is "
            "needed for fair time limits; use a faster machine or state its own reference",
            code="sandbox-unavailable",
        )
    return speed
