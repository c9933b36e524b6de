"""Level `namespaces`: bubblewrap, with user, process, network, IPC, name and mount namespaces, a
system call filter, and resource limits set inside.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Sequence
from contextlib import ExitStack

from asap.errors import CapacityError
from asap_evaluator.isolation import Limits, Program
from asap_evaluator.process import sealed
from asap_evaluator.rootfs import RootFolder
from asap_evaluator.seccomp import filter_bpf

__all__ = ["Bubblewrap"]

SCRIPT = "/tmp/prog.py"
TMP_BYTES = 16 * 2**20
SHM_BYTES = 2**20


class Bubblewrap:
    """Starts programs below a root folder that they can only read.

    Raises CapacityError `sandbox-unavailable` without bubblewrap or libseccomp.
    """

    name = "namespaces"
    stop_signal = signal.SIGKILL

    def __init__(self, root: RootFolder) -> None:
        program = shutil.which("bwrap")
        if program is None:
            raise CapacityError("bwrap is missing: install bubblewrap", code="sandbox-unavailable")
        self._filter = filter_bpf(alone=False)
        self._fixed = [
            *(program, "--unshare-all", "--die-with-parent", "--new-session"),
            *("--clearenv", "--setenv", "PATH", "/usr/bin", "--setenv", "HOME", "/tmp"),
            *("--setenv", "LANG", "C.UTF-8", "--setenv", "OPENBLAS_NUM_THREADS", "1"),
            *("--ro-bind", str(root.path), "/", "--proc", "/proc", "--dev", "/dev"),
            *("--size", str(TMP_BYTES), "--perms", "1777", "--tmpfs", "/tmp"),
            # Through /proc/1/mem a program would write its way into the sandbox's init, which has
            # no limits; no filter of system calls can tell that file from others.
            *("--size", "4096", "--perms", "0555", "--tmpfs", "/proc/1", "--remount-ro", "/proc/1"),
            # Unsized, shared memory would be a way past the memory limit.
            *("--size", str(SHM_BYTES), "--perms", "1777", "--tmpfs", "/dev/shm"),
            *("--uid", "65534", "--gid", "65534", "--hostname", "sandbox"),
            *("--cap-drop", "ALL", "--chdir", "/tmp"),
        ]

    def command(
        self,
        program: Program,
        arguments: Sequence[str],
        status: int,
        limits: Limits,
        held: ExitStack,
    ) -> tuple[list[str], list[int]]:
        """bwrap, prlimit, python. The limits are set inside the user namespace, where the number of
        processes counts this sandbox alone.
        """
        script, seccomp = sealed(program.source.encode(), held), sealed(self._filter, held)
        command = [
            *self._fixed,
            *("--seccomp", str(seccomp), "--ro-bind-data", str(script), SCRIPT),
            *("--json-status-fd", str(status), "--remount-ro", "/dev", "--"),
            *("/usr/bin/prlimit", f"--nproc={limits.processes}", f"--as={limits.address_bytes}"),
            *(f"--cpu={limits.cpu_s}:{limits.cpu_s + 1}", f"--fsize={limits.file_bytes}"),
            *(f"--nofile={limits.files}", "--core=0", f"--stack={limits.stack_bytes}"),
            *("/usr/bin/python3", "-I", SCRIPT, *arguments),
        ]
        return command, [script, seccomp]
