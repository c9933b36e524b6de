"""What carries out a run: a process on this machine or a Kubernetes Job, behind one protocol.

Names are made of run and attempt, so a launch that is repeated finds the first one. The exit codes
of the training process are the contract: 0 done, 78 refused, 143 stopped after a checkpoint; 137 is
the kernel's, out of memory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from asap.runs import Launch, TrainRun

__all__ = [
    "LOG_BYTES",
    "LOG_LINES",
    "Launcher",
    "Status",
    "ended",
    "launch_name",
    "own_lines",
    "run_id_of",
]

LOG_LINES = 50
LOG_BYTES = 64 * 2**10
"""What of the end of a log is read for them."""
_NAME = "asap-train"
_REFUSED, _OUT_OF_MEMORY, _STOPPED = 78, 137, 143


@dataclass(frozen=True, slots=True)
class Status:
    """How a launch stands. `failed` is the run's own end; `evicted` and `gone` are not its fault:
    it goes on from its checkpoint.
    """

    phase: Literal["waiting", "running", "succeeded", "failed", "evicted", "gone"]
    reason: str | None = None
    """Of waiting, failed and evicted: a short stable word, such as `deadline`."""
    exit_code: int | None = None
    log: tuple[str, ...] = ()
    """The last lines of a failed one, see `own_lines`."""


class Launcher(Protocol):
    """Starts, follows and ends the work on runs.

    Every method may raise CapacityError (`cluster-unavailable`): ask again later.
    """

    async def check(self) -> None:
        """Raise CapacityError when nothing could be launched here."""

    async def launch(self, run: TrainRun, attempt: int) -> Launch:
        """Start an attempt, or adopt it when it was started before.

        Raises CapacityError (`quota-refused`) while there is no room, Conflict when the name is
        taken by somebody else's work, Misconfigured when this can never work.
        """

    async def look(self, launch: Launch) -> Status:
        """How it stands."""

    async def stop(self, launch: Launch) -> None:
        """End it: at first with time for a checkpoint, later by force. Returns at once; without
        effect when it has ended. Call again until it is not `launched` any more.
        """

    async def launched(self) -> Sequence[Launch]:
        """What works here now, whoever launched it."""


def launch_name(run_id: str, attempt: int) -> str:
    """The name of process folder and Job: 44 characters, and the digits of the attempt."""
    return f"{_NAME}-{run_id}-{attempt}"


def run_id_of(launch: Launch) -> str:
    """The run that a launch works on."""
    return launch.name.removeprefix(f"{_NAME}-").rpartition("-")[0]


def ended(exit_code: int, log: Sequence[str] = ()) -> Status:
    """What the exit code of a training process means."""
    if exit_code == 0:
        return Status("succeeded", exit_code=0)
    if exit_code == _STOPPED:
        return Status("evicted", "stopped", exit_code)
    reasons = {_REFUSED: "refused", _OUT_OF_MEMORY: "out-of-memory"}
    return Status("failed", reasons.get(exit_code, "crashed"), exit_code, tuple(log))


def own_lines(text: str) -> tuple[str, ...]:
    """The last lines that the training process logged itself: our events as JSON objects.

    All else on its output is left out: tracebacks and prints of libraries quote samples and keys.
    """
    return tuple(line for line in text.splitlines() if _is_event(line))[-LOG_LINES:]


def _is_event(line: str) -> bool:
    try:
        event = json.loads(line)
    except ValueError:
        return False
    return isinstance(event, dict) and {"event", "level", "timestamp"} <= event.keys()
