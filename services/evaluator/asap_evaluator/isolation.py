"""The words of isolation: a program, its limits, who it runs as, how it ended, and what a level of
isolation must be able to do.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, Protocol

__all__ = ["Identity", "Level", "Limits", "Outcome", "Program", "Run", "Stop"]

Stop = Literal["wall", "memory", "output", "done"]
"""Why a run was ended from outside; `done`: its partner had finished."""


@dataclass(frozen=True)
class Limits:
    """What one sandbox may use."""

    cpu_s: int = 5
    """Of each process; the wall clock bounds them together."""
    wall_s: float = 15.0
    memory_bytes: int = 768 * 2**20
    """Resident in all processes together, looked at every 20 ms."""
    address_bytes: int = 4 * 2**30
    """Of each process. Far above `memory_bytes`: threads and libraries reserve what they never
    touch.
    """
    stack_bytes: int = 64 * 2**20
    processes: int = 32
    files: int = 64
    file_bytes: int = 8 * 2**20
    output_bytes: int = 2**20
    """Of each of stdout and stderr."""
    report_bytes: int = 16 * 2**20


@dataclass(frozen=True)
class Program:
    """What runs in one sandbox. Its arguments are descriptor numbers: `setup` to read if there is
    one, the report to write if `reports`, then `pipes`.
    """

    source: str
    stdin: bytes = b""
    setup: bytes | None = None
    reports: bool = False
    pipes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Identity:
    """The ordinary user that sandboxes are started as; None: the user of this process."""

    uid: int | None = None


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `trouble` says what failed of the sandbox itself; then nothing else
    counts.
    """

    exit_code: int | None
    """As a shell gives it: 128 and the signal's number for a killed program."""
    stop: Stop | None
    stdout: bytes
    stderr: bytes
    report: bytes
    seconds: float
    cpu_s: float
    """User and system, of all its processes."""
    memory_bytes: int
    """Most that was seen resident; short runs may end unseen."""
    trouble: str | None = None


class Level(Protocol):
    """A way to isolate. It starts one process, which tells on `status` as JSON objects first its
    `child-pid`, the process to signal, and last the `exit-code`.
    """

    name: str
    stop_signal: signal.Signals
    """Sent to `child-pid`, it ends the whole tree."""

    def command(
        self,
        program: Program,
        arguments: Sequence[str],
        status: int,
        limits: Limits,
        held: ExitStack,
    ) -> tuple[list[str], list[int]]:
        """The command line, and the descriptors it needs besides the program's. What must live as
        long as the run is entered into `held`.
        """
        ...


Run = Callable[[Sequence[Program], Limits], list[Outcome]]
"""Runs programs at once, each in a sandbox of its own, until the first has ended. Blocks."""
