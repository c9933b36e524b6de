from __future__ import annotations

import json

import pytest

from asap.errors import CapacityError
from asap_evaluator import bubblewrap
from asap_evaluator.bubblewrap import Bubblewrap
from asap_evaluator.isolation import Limits, Program
from asap_evaluator.rootfs import RootFolder
from waiting import PATIENCE_S

pytestmark = pytest.mark.contract

LOOK = """
import json, os, resource, socket
from pathlib import Path
print(json.dumps({
    "uid": os.getuid(), "pids": [int(n) for n in os.listdir("/proc") if n.isdigit()],
    "files": sorted(os.listdir("/tmp")), "host": socket.gethostname(),
    "caps": Path("/proc/self/status").read_text().split("CapEff:")[1].split()[0],
    "init": os.listdir("/proc/1"), "fds": len(os.listdir("/proc/self/fd")),
    "processes": resource.getrlimit(resource.RLIMIT_NPROC),
    "cpu": resource.getrlimit(resource.RLIMIT_CPU),
    "core": resource.getrlimit(resource.RLIMIT_CORE),
    "files_open": resource.getrlimit(resource.RLIMIT_NOFILE),
    "shm": os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize,
    "tmp": os.statvfs("/tmp").f_blocks * os.statvfs("/tmp").f_frsize,
}))
"""


def test_a_program_is_alone_poor_and_nobody(namespaces):
    limits = Limits(cpu_s=3, processes=20, files=30, wall_s=PATIENCE_S)
    (outcome,) = namespaces.run([Program(source=LOOK)], limits)
    seen = json.loads(outcome.stdout)
    assert seen["uid"] == 65534
    assert seen["pids"] == [1, 2]
    assert seen["files"] == ["prog.py"]
    assert seen["host"] == "sandbox"
    assert int(seen["caps"], 16) == 0
    assert seen["init"] == []
    assert seen["fds"] == 4  # the three streams, and the folder that is being listed
    assert seen["processes"] == [20, 20]
    assert seen["files_open"] == [30, 30]
    assert seen["cpu"] == [3, 4]
    assert seen["core"] == [0, 0]
    assert (seen["shm"], seen["tmp"]) == (2**20, 16 * 2**20)


def test_its_own_text_cannot_be_changed(namespaces):
    source = "open('/tmp/prog.py', 'ab')"
    (outcome,) = namespaces.run([Program(source=source)], Limits(wall_s=PATIENCE_S))
    assert b"Read-only file system" in outcome.stderr


def test_a_root_folder_that_is_none_is_trouble(namespaces, tmp_path):
    from asap_evaluator.process import run_programs

    level = Bubblewrap(RootFolder(tmp_path))
    (outcome,) = run_programs(level, [Program(source="1")], Limits(), namespaces.identity)
    assert outcome.trouble


def test_without_bubblewrap_there_is_no_such_level(monkeypatch, tmp_path):
    monkeypatch.setattr(bubblewrap.shutil, "which", lambda name: None)
    with pytest.raises(CapacityError) as caught:
        Bubblewrap(RootFolder(tmp_path))
    assert caught.value.problem_code == "sandbox-unavailable"
