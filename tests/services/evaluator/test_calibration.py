from __future__ import annotations

import pytest

from asap.errors import CapacityError
from asap_evaluator.calibration import TRIES, calibrate
from asap_evaluator.isolation import Limits, Outcome


def measured(*seconds, **fields):
    """Runs of the calibration program that take these CPU seconds."""
    left = iter(seconds)
    values = dict(
        exit_code=0, stop=None, stderr=b"", report=b"", seconds=1, cpu_s=1, memory_bytes=1
    )

    def run(programs, limits):
        return [Outcome(**{**values, "stdout": str(next(left)).encode(), **fields})]

    return run


def test_the_best_of_three_counts():
    assert TRIES == 3
    assert calibrate(measured(4.0, 0.5, 1.0), Limits(), reference_cpu_s=1.0) == 2.0


def test_a_machine_below_a_quarter_is_refused():
    assert calibrate(measured(4.0, 4.0, 4.0), Limits(), reference_cpu_s=1.0) == 0.25
    with pytest.raises(CapacityError, match="reference speed") as caught:
        calibrate(measured(4.1, 4.1, 4.1), Limits(), reference_cpu_s=1.0)
    assert caught.value.problem_code == "sandbox-unavailable"


def test_a_program_that_does_not_run_is_refused():
    with pytest.raises(CapacityError, match="did not run"):
        calibrate(measured(1.0, exit_code=1), Limits())


@pytest.mark.contract
def test_it_runs_in_the_sandbox(sandbox):
    assert calibrate(sandbox.run, sandbox.limits, reference_cpu_s=10.0) > 0.25
