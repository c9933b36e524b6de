from __future__ import annotations

import subprocess
import sys

import pytest

from asap_evaluator.isolation import Identity, Outcome
from asap_evaluator.probes import PROBES, self_test


def unprotected(programs, limits):
    """Runs a probe as an ordinary child of this process: each must notice that nothing holds it.
    The two that take the machine's resources are only pretended to succeed.
    """
    (program,) = programs
    source = program.source
    if "os.fork()" in source or "bytearray" in source:
        stdout = b"succeeded\ntried\n"
    else:
        stdout = subprocess.run(
            [sys.executable, "-c", source], capture_output=True, check=False
        ).stdout
    return [
        Outcome(
            exit_code=0, stop=None, stdout=stdout, stderr=b"", report=b"", seconds=1, cpu_s=1,
            memory_bytes=1,
        )
    ]  # fmt: skip


def test_there_are_ten():
    assert len(PROBES) == 10


def test_each_probe_notices_a_sandbox_that_holds_nothing():
    found = self_test(unprotected, Identity())
    harmless = {"kernel settings", "write outside"}  # an ordinary user may be held by the system
    assert {name for name, complaint in found.items() if not complaint} <= harmless


def test_a_probe_that_breaks_proves_nothing():
    def broken(programs, limits):
        return [
            Outcome(
                exit_code=1, stop=None, stdout=b"", stderr=b"SyntaxError", report=b"", seconds=1,
                cpu_s=1, memory_bytes=1,
            )
        ]  # fmt: skip

    assert all("broke" in complaint for complaint in self_test(broken, Identity()).values())


@pytest.mark.contract
def test_real_levels_hold_them_all(sandbox):
    assert self_test(sandbox.run, sandbox.identity) == dict.fromkeys(PROBES, "")
