"""The processes of one session, by /proc: who lives, and which is still the one that was started.

A process id alone may have been given to somebody else since; with the moment of its start it names
one process. While any member of a session lives, the kernel gives its id to nobody.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Leader", "ended", "leader", "living", "signal_all"]


@dataclass(frozen=True, slots=True)
class Leader:
    """The first process of a session."""

    pid: int
    started: str
    """Boot of the machine, and clock ticks since then."""


@dataclass(frozen=True, slots=True)
class _Stat:
    state: str
    session: int
    started: str


def leader(pid: int) -> Leader:
    """The leader with this id, which lives or is not waited for yet."""
    stat = _stat(pid)
    return Leader(pid, "" if stat is None else stat.started)


def ended(first: Leader) -> bool:
    """Whether that process itself is gone, or waits to be reaped."""
    stat = _stat(first.pid)
    return stat is None or stat.state == "Z" or stat.started != first.started


def living(first: Leader) -> list[int]:
    """The session's living processes. Empty where its id is another process's by now."""
    stat = _stat(first.pid)
    if stat is not None and stat.started != first.started:
        return []
    if not first.started.startswith(_boot()):
        return []  # the machine was started anew since
    found = []
    for pid in (int(name) for name in os.listdir("/proc") if name.isdecimal()):
        stat = _stat(pid)
        if stat is None or stat.session != first.pid:
            continue
        if stat.state != "Z":
            found.append(pid)
        elif pid != first.pid:  # that one is reaped by whoever started it
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
    return found


def signal_all(first: Leader, number: signal.Signals) -> None:
    """Send a signal to every process of the session."""
    for pid in living(first):
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = text.rpartition(b")")[2].split()
    return _Stat(fields[0].decode(), int(fields[3]), f"{_boot()}:{int(fields[19])}")


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
