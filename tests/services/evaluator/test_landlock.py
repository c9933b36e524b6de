from __future__ import annotations

import pytest

from asap.errors import CapacityError
from asap_evaluator import landlock as module
from asap_evaluator.inside.supervise import descendants
from asap_evaluator.isolation import Identity, Limits, Program
from asap_evaluator.landlock import Landlock, landlock_abi
from asap_evaluator.rootfs import RootFolder
from waiting import PATIENCE_S, until


def run(sandbox, source):
    (outcome,) = sandbox.run([Program(source=source)], Limits(cpu_s=2, wall_s=PATIENCE_S))
    assert outcome.trouble is None
    return outcome


def test_below_abi_6_there_is_no_such_level(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "landlock_abi", lambda: 5)
    with pytest.raises(CapacityError, match="ABI 5"):
        Landlock(RootFolder(tmp_path), Identity())


@pytest.mark.contract
def test_the_exit_code_is_the_programs(landlock):
    assert landlock_abi() >= 6
    assert run(landlock, "raise SystemExit(7)").exit_code == 7
    assert run(landlock, "import os; os.kill(os.getpid(), 9)").exit_code == 137


@pytest.mark.contract
def test_a_program_writes_nowhere_and_reads_only_its_root_and_itself(landlock, tmp_path):
    (tmp_path / "other").write_text("x")
    for path in ("/tmp/x", "/dev/shm/x", str(tmp_path / "new")):
        assert b"Permission denied" in run(landlock, f"open({path!r}, 'w')").stderr
    assert b"Permission denied" in run(landlock, f"open({str(tmp_path / 'other')!r})").stderr
    assert b"import" in run(landlock, "import os; print(open(os.__file__).read())").stdout
    assert run(landlock, "print(open(__file__).read())").exit_code == 0


@pytest.mark.contract
async def test_orphans_of_a_finished_program_are_ended(landlock):
    before = set(descendants())
    source = """
import os, time
for _ in range(5):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(3600)
        os._exit(0)
"""
    assert run(landlock, source).exit_code == 0
    await until(lambda: set(descendants()) <= before)


@pytest.mark.contract
def test_a_confinement_that_fails_is_trouble(landlock, monkeypatch):
    monkeypatch.setattr(module, "DEVICES", {"/dev/missing": 4})
    (outcome,) = landlock.run([Program(source="print(1)")], Limits())
    assert outcome.trouble
    assert outcome.stdout == b""
