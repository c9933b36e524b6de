"""Level `landlock`: no namespaces; Landlock for files, TCP, abstract sockets and signals, a system
call filter for all other sockets and shared state, resource limits, and a supervisor that ends the
tree. For pods that may not create namespaces.

A program may read the root folder and its own text, and write nowhere. The number of processes is
counted by the kernel for the user as a whole, so the limit is what runs already plus its own share.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from importlib import resources
from pathlib import Path

from asap.errors import CapacityError
from asap_evaluator.isolation import Identity, Limits, Program
from asap_evaluator.process import sealed
from asap_evaluator.rootfs import RootFolder
from asap_evaluator.seccomp import filter_bpf

__all__ = ["LEAST_ABI", "Landlock", "landlock_abi"]

LEAST_ABI = 6
"""The first that keeps signals and abstract sockets inside."""
CREATE_RULESET, VERSION_FLAG = 444, 1
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
READ = EXECUTE | READ_FILE | READ_DIR
DEVICES = {"/dev/null": READ_FILE | WRITE_FILE, "/dev/urandom": READ_FILE, "/dev/zero": READ_FILE}
ENVIRONMENT = {
    "PATH": "/usr/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "OPENBLAS_NUM_THREADS": "1",
}


def landlock_abi() -> int:
    """The kernel's version of Landlock; 0 without it."""
    libc = ctypes.CDLL(None, use_errno=True)
    return max(0, int(libc.syscall(CREATE_RULESET, None, 0, VERSION_FLAG)))


class Landlock:
    """Starts programs that can only read a root folder.

    Raises CapacityError `sandbox-unavailable` below Landlock ABI 6 or without libseccomp.
    """

    name = "landlock"
    stop_signal = signal.SIGTERM

    def __init__(self, root: RootFolder, identity: Identity) -> None:
        abi = landlock_abi()
        if abi < LEAST_ABI:
            raise CapacityError(
                f"Landlock ABI {abi}; {LEAST_ABI} or more is needed (Linux 6.12)",
                code="sandbox-unavailable",
            )
        self._filter = filter_bpf(alone=True)
        self._root = root
        self._uid = os.getuid() if identity.uid is None else identity.uid
        source = resources.files("asap_evaluator.inside").joinpath("supervise.py")
        self._supervisor = source.read_text(encoding="utf-8")

    def command(
        self,
        program: Program,
        arguments: Sequence[str],
        status: int,
        limits: Limits,
        held: ExitStack,
    ) -> tuple[list[str], list[int]]:
        """The supervisor with its orders; the program's text lies in a folder of its own."""
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="asap-program-")))
        folder.chmod(0o755)
        script = folder / "prog.py"
        script.write_text(program.source, encoding="utf-8", errors="surrogatepass")
        script.chmod(0o644)
        seccomp = sealed(self._filter, held)
        orders = {
            "command": [*self._root.loader, "-I", str(script), *arguments],
            "environment": ENVIRONMENT,
            "limits": self._resources(limits),
            "paths": [[str(self._root.path), READ], [str(folder), READ], *DEVICES.items()],
            "filter": seccomp,
            "status": status,
        }
        return [*self._root.loader, "-I", "-c", self._supervisor, json.dumps(orders)], [seccomp]

    def _resources(self, limits: Limits) -> dict[str, tuple[int, int]]:
        processes = _tasks_of(self._uid) + limits.processes
        same = {
            "RLIMIT_NPROC": processes,
            "RLIMIT_AS": limits.address_bytes,
            "RLIMIT_FSIZE": limits.file_bytes,
            "RLIMIT_NOFILE": limits.files,
            "RLIMIT_CORE": 0,
            "RLIMIT_STACK": limits.stack_bytes,
        }
        cpu = {"RLIMIT_CPU": (limits.cpu_s, limits.cpu_s + 1)}
        return {name: (value, value) for name, value in same.items()} | cpu


def _tasks_of(uid: int) -> int:
    """How many threads a user has."""
    count = 0
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with suppress(OSError):
                if entry.stat().st_uid == uid:
                    count += len(os.listdir(f"{entry.path}/task"))
    return count
