"""Programs in sandboxes from start to end: streams read while they run, limits kept from outside,
the whole tree killed and reaped.

Knows what a level of isolation starts and how it stops, and nothing of verdicts. Blocking; one
thread a run.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from asap_evaluator.isolation import Identity, Level, Limits, Outcome, Program, Stop

__all__ = ["adopt_orphans", "run_programs", "sealed"]

CHUNK = 65536
TICKS_S = (0.005, 0.01, 0.02)
"""Between looks at clock and memory, the last from then on."""
GRACE_S = 0.5
REAP_S = 10.0
"""A killed tree was gone within 0.1 s wherever it was measured."""
PAGE, TICK_HZ = resource.getpagesize(), os.sysconf("SC_CLK_TCK")
PR_SET_CHILD_SUBREAPER = 36


@dataclass
class _Stream:
    """A pipe that is read while the program runs."""

    limit: int
    content: bytearray = field(default_factory=bytearray)


def sealed(content: bytes, held: ExitStack) -> int:
    """A descriptor to read the content from, which nobody can change."""
    written = os.memfd_create("input", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    try:
        with open(written, "wb", closefd=False) as file:
            file.write(content)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(written, fcntl.F_ADD_SEALS, seals)
        read = os.open(f"/proc/self/fd/{written}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(written)
    held.callback(os.close, read)
    return read


class _Running:
    """One started sandbox."""

    def __init__(self, level: Level, program: Program, limits: Limits, identity: Identity) -> None:
        self.limits = limits
        self.stop: Stop | None = None
        self.ended: float | None = None
        self.peak = 0
        self._cpu_s = 0.0
        self._level = level
        self._init: int | None = None
        self._held = ExitStack()
        self._streams: dict[int, _Stream] = {}
        self._names: dict[str, int] = {}
        self.started = time.monotonic()
        try:
            self._process = self._spawn(level, program, identity)
            self.pidfd = self._hold(os.pidfd_open(self._process.pid))
        except BaseException:
            self._held.close()
            raise

    def _spawn(self, level: Level, program: Program, identity: Identity) -> subprocess.Popen[bytes]:
        with ExitStack() as ours:
            passed = list(program.pipes)
            stdout = self._pipe("stdout", self.limits.output_bytes, ours)
            stderr = self._pipe("stderr", self.limits.output_bytes, ours)
            status = self._pipe("status", CHUNK, ours)
            own: list[int] = []
            if program.setup is not None:
                own.append(sealed(program.setup, ours))
            if program.reports:
                own.append(self._pipe("report", self.limits.report_bytes, ours))
            passed[:0] = own
            arguments = [str(fd) for fd in passed]
            command, more = level.command(program, arguments, status, self.limits, self._held)
            return subprocess.Popen(
                command,
                stdin=sealed(program.stdin, ours),
                stdout=stdout,
                stderr=stderr,
                pass_fds=[*passed, *more, status],
                env={},  # the sandbox's own init would show ours
                cwd="/",
                umask=0o077,
                start_new_session=True,
                user=identity.uid,
                group=identity.uid,
                extra_groups=None if identity.uid is None else [],
            )

    def _hold(self, fd: int) -> int:
        self._held.callback(os.close, fd)
        return fd

    def _pipe(self, name: str, limit: int, ours: ExitStack) -> int:
        read, write = os.pipe()
        ours.callback(os.close, write)
        os.set_blocking(self._hold(read), False)
        self._streams[read] = _Stream(limit)
        self._names[name] = read
        return write

    def register(self, selector: selectors.BaseSelector) -> None:
        for fd in (*self._streams, self.pidfd):
            selector.register(fd, selectors.EVENT_READ, self)

    def read(self, fd: int, selector: selectors.BaseSelector) -> None:
        """Take what a stream has; an end or the process's end is taken note of."""
        if fd == self.pidfd:
            self.ended = time.monotonic()
            selector.unregister(fd)
        elif not self._take(fd):
            selector.unregister(fd)

    def _take(self, fd: int) -> bool:
        try:
            chunk = os.read(fd, CHUNK)
        except BlockingIOError:
            return True
        stream = self._streams[fd]
        stream.content += chunk[: stream.limit - len(stream.content)]
        if len(stream.content) >= stream.limit and self.ended is None:
            self.kill("output")
        if fd == self._names["status"] and self._init is None:
            self._find_init()
        return bool(chunk)

    def _status(self, key: str) -> int | None:
        for line in bytes(self._streams[self._names["status"]].content).splitlines():
            with suppress(ValueError):
                value = json.loads(line).get(key)
                if isinstance(value, int):
                    return value
        return None

    def _find_init(self) -> None:
        pid = self._status("child-pid")
        if pid is None:
            return
        with suppress(OSError):
            pidfd = self._hold(os.pidfd_open(pid))
            # The number may be another process's by now, unless it is still our child's child.
            if pid == self._process.pid or _parent(pid) == self._process.pid:
                self._init = pidfd

    def look(self) -> None:
        """Keep the memory limit."""
        resident, cpu_s = _usage(self._process.pid)
        self.peak, self._cpu_s = max(self.peak, resident), max(self._cpu_s, cpu_s)
        if self.peak > self.limits.memory_bytes:
            self.kill("memory")

    def wait(self, seconds: float) -> None:
        """Let it end by itself, as it does when its partner's pipes close. Not while it is read:
        a chatty one is not worth the wait.
        """
        if self.ended is None and self.stop is None and _ready(self.pidfd, seconds):
            self.ended = time.monotonic()

    def kill(self, reason: Stop) -> None:
        """End the tree; the first reason counts."""
        if self.ended is not None or self.stop is not None:
            return
        self.stop = reason
        with suppress(ProcessLookupError):
            if self._init is None:
                self._process.kill()
            else:
                signal.pidfd_send_signal(self._init, self._level.stop_signal)

    def reap(self) -> Outcome:
        """Wait for the end of what was killed, and collect."""
        trouble = None
        if self.ended is None and not _ready(self.pidfd, REAP_S):
            trouble = f"the sandbox did not end within {REAP_S:.0f} s after its kill"
            self._process.kill()
        ended = self.ended or time.monotonic()
        _, status, usage = os.wait4(self._process.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        cpu_s = usage.ru_utime + usage.ru_stime + self._reap_init()
        for fd in self._streams:
            self.ended = ended
            while self._more(fd):
                pass
        exit_code, started = self._status("exit-code"), self._status("child-pid")
        unknown = started is None if self.stop else exit_code is None
        if trouble is None and unknown and self.stop != "done":
            trouble = f"no sandbox: {self._text('stderr')[-300:].decode(errors='replace')}"
        self._held.close()
        return Outcome(
            exit_code=exit_code,
            stop=self.stop,
            stdout=self._text("stdout"),
            stderr=self._text("stderr"),
            report=self._text("report"),
            seconds=ended - self.started,
            cpu_s=max(self._cpu_s, cpu_s),
            memory_bytes=self.peak,
            trouble=trouble,
        )

    def _reap_init(self) -> float:
        """CPU seconds of the sandbox's init. Its parent ends before it, so that it comes to us."""
        pid = self._status("child-pid")
        if pid is not None:
            with suppress(ChildProcessError):
                usage = os.wait4(pid, 0)[2]
                return usage.ru_utime + usage.ru_stime
        return 0.0

    def _more(self, fd: int) -> bool:
        before = len(self._streams[fd].content)
        return self._take(fd) and len(self._streams[fd].content) > before

    def _text(self, name: str) -> bytes:
        return bytes(self._streams[self._names[name]].content) if name in self._names else b""


def adopt_orphans() -> None:
    """Make this process the parent of its descendants' orphans. Needed once before the first run:
    bubblewrap ends a moment before its init, which else is a zombie of whoever is process 1.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def run_programs(
    level: Level, programs: Sequence[Program], limits: Limits, identity: Identity
) -> list[Outcome]:
    """Run each in a sandbox of its own, all at once, until the first has ended; the others are
    killed then. The pipes between them are closed here once all are started.
    """
    running: list[_Running] = []
    try:
        try:
            for program in programs:
                running.append(_Running(level, program, limits, identity))
        finally:
            for fd in {fd for program in programs for fd in program.pipes}:
                os.close(fd)
        _watch(running, limits.wall_s)
        for one in running[1:]:
            one.wait(GRACE_S)
    finally:
        for one in running:
            one.kill("done")
        outcomes = [one.reap() for one in running]
    return outcomes


def _watch(running: list[_Running], wall_s: float) -> None:
    """Read streams and keep limits until the first of them has ended."""
    first, began = running[0], time.monotonic()
    with selectors.DefaultSelector() as selector:
        for one in running:
            one.register(selector)
        ticks = iter(TICKS_S)
        tick = looked = 0.0
        while first.ended is None:
            now = time.monotonic()
            if now - looked >= tick:
                looked, tick = now, next(ticks, TICKS_S[-1])
                for one in running:
                    one.look()
            if now - began >= wall_s:
                for one in running:
                    one.kill("wall")
            if any(one.stop for one in running):
                break
            for key, _ in selector.select(tick):
                key.data.read(key.fd, selector)


def _ready(pidfd: int, seconds: float) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(pidfd, selectors.EVENT_READ)
        return bool(selector.select(seconds))


def _parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[1])


def _usage(pid: int) -> tuple[int, float]:
    """Of a process and all its descendants: resident bytes, with shared pages once for each, and
    CPU seconds.
    """
    pages, ticks, waiting = 0, 0, [pid]
    while waiting:
        folder = f"/proc/{waiting.pop()}"
        with suppress(OSError):
            with open(f"{folder}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
            pages += int(fields[21])
            ticks += sum(map(int, fields[11:15]))  # own and those of children that were waited for
            for task in os.listdir(f"{folder}/task"):
                with open(f"{folder}/task/{task}/children", "rb") as file:
                    waiting += map(int, file.read().split())
    return pages * PAGE, ticks / TICK_HZ
