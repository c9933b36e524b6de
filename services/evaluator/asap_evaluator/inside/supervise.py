"""Runs around a program without namespaces: confines a child, starts the program in it, ends all
its descendants.

Tells on a descriptor, as bubblewrap does, its own number as `child-pid` and at the end the
`exit-code`. SIGTERM ends the run. It is not confined itself; the program's Landlock domain keeps
its signals from it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Config = dict[str, Any]

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP = 1, 4, 22
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 36, 38, 2
FS_ALL, NET_ALL, SCOPE_ALL = (1 << 16) - 1, 0b11, 0b11
"""All of Landlock ABI 6: files, TCP bind and connect, abstract sockets and signals."""

libc = ctypes.CDLL(None, use_errno=True)


class Ruleset(ctypes.Structure):
    """struct landlock_ruleset_attr."""

    _fields_ = (
        ("files", ctypes.c_uint64),
        ("net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


class PathRule(ctypes.Structure):
    """struct landlock_path_beneath_attr."""

    _pack_ = 1
    _fields_ = (("access", ctypes.c_uint64), ("parent", ctypes.c_int32))


class FilterProgram(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


class Stopped(BaseException):
    """The run is to end now."""


def call(function: Any, *args: Any) -> int:
    """A call of libc that must succeed."""
    result = int(function(*args))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def confine(config: Config) -> None:
    """Limits, no new privileges, files, network, signals, system calls: from here on for good."""
    call(libc.prctl, PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.setsid()
    for name, (soft, hard) in config["limits"].items():
        resource.setrlimit(getattr(resource, name), (soft, hard))
    call(libc.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    attributes = Ruleset(FS_ALL, NET_ALL, SCOPE_ALL)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    ruleset = call(libc.syscall, CREATE_RULESET, ctypes.byref(attributes), size, 0)
    for path, access in config["paths"]:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = PathRule(access, parent)
        call(libc.syscall, ADD_RULE, ruleset, 1, ctypes.byref(rule), 0)
        os.close(parent)
    call(libc.syscall, RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)
    with os.fdopen(config["filter"], "rb") as file:
        bpf = file.read()
    program = FilterProgram(len(bpf) // 8, bpf)
    call(libc.prctl, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0)


def start(config: Config) -> int:
    """The confined program's number. Raises OSError when it could not be confined or started."""
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(config["status"])
            confine(config)
            os.execve(config["command"][0], config["command"], config["environment"])
        except BaseException as error:
            os.write(tell, repr(error).encode())
        os._exit(1)
    os.close(tell)
    with os.fdopen(told, "rb") as file:
        trouble = file.read()
    if trouble:
        raise OSError(trouble.decode())
    return pid


def descendants() -> list[int]:
    """Numbers of all processes below this one."""
    found: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        folder = f"/proc/{waiting.pop()}/task"
        try:
            for task in os.listdir(folder):
                with open(f"{folder}/{task}/children") as file:
                    waiting += map(int, file.read().split())
        except OSError:  # gone meanwhile
            continue
        found += waiting
    return list(set(found))


def sweep() -> None:
    """End all descendants; those that fork meanwhile are halted first."""
    while True:
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in descendants():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def main(text: str) -> None:
    """Supervise one program; `text` is the JSON of its command, limits, paths and descriptors."""
    config = json.loads(text)

    def stop(*_: object) -> None:
        raise Stopped

    signal.signal(signal.SIGTERM, stop)
    call(libc.prctl, PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    call(libc.prctl, PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    call(libc.prctl, PR_SET_DUMPABLE, 0, 0, 0, 0)
    status = config["status"]
    os.set_inheritable(status, False)
    code = None
    try:
        os.write(status, json.dumps({"child-pid": os.getpid()}).encode() + b"\n")
        pid = start(config)
        ended = 0
        while ended != pid:
            ended, state = os.wait()
        code = os.waitstatus_to_exitcode(state)
    except Stopped:
        pass
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sweep()
    if code is not None:
        exit_code = code if code >= 0 else 128 - code
        os.write(status, json.dumps({"exit-code": exit_code}).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1])
