"""The system calls that a model-written program cannot make, as a BPF program for the kernel.

Two strengths. Inside namespaces the filter takes away what attacks the kernel itself. Without them
it also takes away what the namespaces would: sockets, shared memory, other processes' limits and
other files' attributes.
"""

from __future__ import annotations

import errno
import importlib
import tempfile
from functools import cache
from typing import Any

from asap.errors import CapacityError

__all__ = ["filter_bpf"]

AF_UNIX, SOCK_STREAM, SOCK_TYPE = 1, 1, 0xF
TIOCSTI = 0x5412
NAMESPACES = {
    "mount": 0x00020000,
    "cgroup": 0x02000000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}
KERNEL = """
    unshare setns mount umount2 pivot_root chroot move_mount open_tree open_tree_attr fsopen
    fsconfig fsmount fspick mount_setattr statmount listmount quotactl quotactl_fd swapon
    swapoff ptrace process_vm_readv process_vm_writev process_madvise process_mrelease
    pidfd_getfd kcmp bpf perf_event_open userfaultfd io_uring_setup io_uring_enter
    io_uring_register add_key request_key keyctl init_module finit_module delete_module
    kexec_load kexec_file_load reboot acct syslog vhangup sethostname setdomainname iopl ioperm
    settimeofday clock_settime clock_adjtime adjtimex memfd_create memfd_secret personality
    open_by_handle_at name_to_handle_at fanotify_init lookup_dcookie nfsservctl move_pages
    migrate_pages
"""
"""Refused at both levels."""
NEIGHBOURS = """
    chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat utime utimes utimensat
    futimesat setxattr lsetxattr fsetxattr setxattrat removexattr lremovexattr fremovexattr
    removexattrat shmget shmat shmctl msgget msgctl semget semctl mq_open mq_unlink setpriority
    ioprio_set inotify_init inotify_init1
"""
"""Refused where the program shares its user's files, processes and memory segments."""
OWN_ONLY = (
    "prlimit64",
    "sched_setaffinity",
    "sched_setscheduler",
    "sched_setparam",
    "sched_setattr",
)
"""… those that take a process, 0 for the caller itself: refused for any other number."""

NEWER = {
    "fchmodat2": 452,
    "statmount": 457,
    "listmount": 458,
    "setxattrat": 463,
    "removexattrat": 466,
    "open_tree_attr": 467,
}
"""Numbers, the same on all machines, of calls younger than a stable system's libseccomp."""


@cache
def filter_bpf(*, alone: bool) -> bytes:
    """The filter as the kernel reads it. `alone`: no namespaces around the program.

    Raises CapacityError `sandbox-unavailable` without libseccomp.
    """
    pyseccomp = _library()
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    refuse = pyseccomp.ERRNO(errno.EPERM)
    for name in (KERNEL + (NEIGHBOURS if alone else "")).split():
        _add(rules, refuse, name)
    # Its flags lie in memory, where a filter cannot look; C libraries fall back to clone.
    _add(rules, pyseccomp.ERRNO(errno.ENOSYS), "clone3")
    for flag in NAMESPACES.values():
        _add(rules, refuse, "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, flag, flag))
    _add(rules, refuse, "ioctl", pyseccomp.Arg(1, pyseccomp.MASKED_EQ, 0xFFFFFFFF, TIOCSTI))
    no_family = pyseccomp.ERRNO(errno.EAFNOSUPPORT)
    if not alone:
        _add(rules, no_family, "socket", pyseccomp.Arg(0, pyseccomp.NE, AF_UNIX))
        return _exported(rules)
    # A connected pair of streams can reach nobody; any other socket can name a socket file.
    _add(rules, no_family, "socket")
    for other in set(range(SOCK_TYPE + 1)) - {SOCK_STREAM}:
        kind = pyseccomp.Arg(1, pyseccomp.MASKED_EQ, SOCK_TYPE, other)
        _add(rules, no_family, "socketpair", kind)
    for name in OWN_ONLY:
        _add(rules, refuse, name, pyseccomp.Arg(0, pyseccomp.NE, 0))
    return _exported(rules)


def _library() -> Any:
    try:
        return importlib.import_module("pyseccomp")
    except (ImportError, OSError, RuntimeError) as error:
        raise CapacityError(
            "no system call filter: install libseccomp2 and pyseccomp", code="sandbox-unavailable"
        ) from error


def _add(rules: Any, action: Any, name: str, *args: Any) -> None:
    pyseccomp = _library()
    number = NEWER.get(name)
    if number is None:
        number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
    rules.add_rule(action, number, *args)


def _exported(rules: Any) -> bytes:
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()
