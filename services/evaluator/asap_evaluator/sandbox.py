"""The sandbox of this process: the best level that has just proved that it holds, or none at all.

There is no unprotected way to run a program; without a level that passes its self-test opening
fails, and grading waits.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from asap.errors import CapacityError
from asap_evaluator.bubblewrap import Bubblewrap
from asap_evaluator.calibration import REFERENCE_CPU_S, calibrate
from asap_evaluator.isolation import Identity, Level, Limits, Outcome, Program, Run
from asap_evaluator.landlock import Landlock, landlock_abi
from asap_evaluator.probes import self_test
from asap_evaluator.process import adopt_orphans, run_programs
from asap_evaluator.rootfs import RootFolder, build_root

__all__ = ["LEVELS", "LevelName", "Sandbox", "physical_cores"]

LevelName = Literal["namespaces", "landlock"]
LEVELS: tuple[LevelName, ...] = ("namespaces", "landlock")
"""Best first. A virtual machine around the whole process is the cluster's to provide."""
NOBODY = 65534


@dataclass(frozen=True)
class Sandbox:
    """Runs programs in isolation. Made by `open`."""

    level: Level
    identity: Identity
    limits: Limits
    speed: float
    """Share of the reference machine's."""
    facts: dict[str, str]
    """Level, kernel, versions and limits, for the report."""
    held: ExitStack

    @classmethod
    def open(
        cls,
        *,
        least: LevelName = "landlock",
        limits: Limits | None = None,
        concurrency: int = 1,
        root: Path | None = None,
        uid: int = NOBODY,
        reference_cpu_s: float = REFERENCE_CPU_S,
        levels: Sequence[LevelName] = LEVELS,
    ) -> Self:
        """Build the root folder, pick the best of `levels` that passes its self-test, calibrate.

        `least`: a weaker level is not tried. `root`: a root folder made before. `uid`: the ordinary
        user that sandboxes are started as when this process is root; else they run as its own user.
        Raises CapacityError `sandbox-unavailable` when no level holds.
        """
        limits = limits or Limits()
        _enough_memory(limits, concurrency)
        identity = _ordinary_user(uid)
        adopt_orphans()
        with ExitStack() as held:
            folder = RootFolder(root) if root else _temporary_root(held)
            refusals: list[str] = []
            for name in levels[: 1 + levels.index(least)]:
                try:
                    level = _open_level(name, folder, identity)
                    _prove(level, identity, limits)
                except CapacityError as refusal:
                    refusals.append(f"{name}: {refusal.detail}")
                    continue
                run = _runner(level, identity)
                speed = calibrate(run, limits, reference_cpu_s=reference_cpu_s)
                facts = _facts(level, limits, speed)
                return cls(level, identity, limits, speed, facts, held.pop_all())
        raise CapacityError(
            "no sandbox holds here, so no program is run; " + "; ".join(refusals),
            code="sandbox-unavailable",
        )

    def run(self, programs: Sequence[Program], limits: Limits) -> list[Outcome]:
        """Run programs at once, each in a sandbox of its own, until the first has ended. Blocks."""
        return run_programs(self.level, programs, limits, self.identity)

    def close(self) -> None:
        """Remove the root folder, if it was made here."""
        self.held.close()


def _runner(level: Level, identity: Identity) -> Run:
    return lambda programs, limits: run_programs(level, programs, limits, identity)


def _open_level(name: LevelName, folder: RootFolder, identity: Identity) -> Level:
    return Bubblewrap(folder) if name == "namespaces" else Landlock(folder, identity)


def _prove(level: Level, identity: Identity, limits: Limits) -> None:
    found = self_test(_runner(level, identity), identity, limits)
    broken = [f"{probe}: {complaint}" for probe, complaint in found.items() if complaint]
    if broken:
        raise CapacityError(f"self-test: {'; '.join(broken)}", code="sandbox-unavailable")


def _ordinary_user(uid: int) -> Identity:
    """Files of the kernel that root owns stay writable in a namespace that root made."""
    if os.geteuid() != 0:
        return Identity()
    if uid < 1000:
        raise CapacityError(
            f"a sandbox is never started as a system user, and uid is {uid}; state 1000 or more",
            code="sandbox-unavailable",
        )
    return Identity(uid)


def _enough_memory(limits: Limits, concurrency: int) -> None:
    needed = limits.memory_bytes * concurrency
    with open("/proc/meminfo", encoding="ascii") as file:
        free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    if free < needed:
        raise CapacityError(
            f"{needed / 2**20:.0f} MiB of free memory are needed for {concurrency} programs at "
            f"once, {free / 2**20:.0f} MiB are there; lower the concurrency or the limit",
            code="sandbox-unavailable",
        )


def _temporary_root(held: ExitStack) -> RootFolder:
    path = Path(tempfile.mkdtemp(prefix="asap-root-"))
    held.callback(shutil.rmtree, path)
    return build_root(path)


def _facts(level: Level, limits: Limits, speed: float) -> dict[str, str]:
    return {
        "level": level.name,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "landlock_abi": str(landlock_abi()),
        "speed": f"{speed:.2f}",
        **{name: str(value) for name, value in vars(limits).items()},
    }


def physical_cores() -> int:
    """Cores that this process may use, threads of one core counted once; at least 1."""
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.exists() else str(cpu))
    return max(1, len(cores))
