"""Runs as processes of this machine, which outlive the worker that started them.

Each has a folder: a shell writes its process id there, runs the training process and leaves its
exit code. A worker that comes later reads both, and takes a process for its own only when the name
of the launch stands in its command line: a process id alone may have gone to somebody else.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from asap.errors import CapacityError, Conflict, InvalidInput
from asap.runs import Launch, TrainRun
from asap_runtime.settings import PREFIX
from asap_trainer.launcher import LOG_BYTES, Status, ended, launch_name, own_lines
from asap_trainer.manifest import train_command
from asap_trainer.settings import TrainerSettings

__all__ = ["LocalLauncher", "training_environment"]

LOG_CAP = 8 * 2**20
"""Bytes of a log; beyond that its older half goes."""
KEEP_S = 86400.0
"""How long the folder of a process that has ended stays to be looked at."""
START_S = 60.0
# `set -C` lets one shell alone create the file: a launch that is repeated ends here. The trap makes
# the shell outlive a signal to the group, for the exit code; the command has the default again.
_SHELL = """
cd -- "$1" || exit
shift
set -C
{ echo $$ > pid; } 2> /dev/null || exit
set +C
trap : TERM
"$@" >> log 2>&1 < /dev/null
echo $? > exit.part && mv exit.part exit
"""
_PASSED_ON = ("ASAP_BLOBS__", "ASAP_TRAINER__", "ASAP_TELEMETRY__LOG_LEVEL")
"""Of our own settings; database, broker and keys are none of the training process's business."""


class LocalLauncher:
    """Processes below one folder, for workers of one machine."""

    def __init__(self, settings: TrainerSettings) -> None:
        self._settings, self._folder = settings, settings.work_dir

    async def check(self) -> None:
        """See `Launcher.check`."""
        await asyncio.to_thread(self._make_folder)

    async def launch(self, run: TrainRun, attempt: int) -> Launch:
        """See `Launcher.launch`."""
        if run.config.nodes > 1:
            raise InvalidInput("a run on several nodes needs the launcher kubernetes")
        name = launch_name(run.id, attempt)
        await asyncio.to_thread(self._launch, run, name)
        return Launch(launcher="subprocess", name=name, attempt=attempt)

    async def look(self, launch: Launch) -> Status:
        """See `Launcher.look`."""
        return await asyncio.to_thread(self._look, launch.name)

    async def stop(self, launch: Launch) -> None:
        """See `Launcher.stop`."""
        await asyncio.to_thread(self._stop, launch.name)

    async def launched(self) -> Sequence[Launch]:
        """See `Launcher.launched`."""
        names = await asyncio.to_thread(self._living)
        return [
            Launch(launcher="subprocess", name=name, attempt=int(name.rpartition("-")[2]))
            for name in names
        ]

    def _make_folder(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise CapacityError(
                f"cannot write to the folder of training processes: {error.strerror}",
                code="not-ready",
            ) from error

    def _launch(self, run: TrainRun, name: str) -> None:
        self._make_folder()
        folder = self._folder / name
        with self._alone():
            self._sweep()
            if _number(folder / "pid") is None:
                if len(self._living()) >= self._settings.trainer.concurrency:
                    raise CapacityError(
                        "all places for training on this machine are taken",
                        code="quota-refused",
                    )
                folder.mkdir(mode=0o700, exist_ok=True)
                (folder / "tenant").write_text(run.tenant)
                self._spawn(run, name)
        if (folder / "tenant").read_text() != run.tenant:
            raise Conflict(f"{name} is the name of another tenant's run")

    def _spawn(self, run: TrainRun, name: str) -> None:
        folder, group = self._folder / name, self._settings.trainer
        command = train_command(run, group.python or sys.executable, group.grace_s)
        child = os.posix_spawn(
            "/bin/sh",
            ["/bin/sh", "-c", _SHELL, name, str(folder), *command],
            training_environment(self._settings, os.environ),
            setsid=True,  # signals to the worker are not for it
        )
        deadline = time.monotonic() + START_S
        while _number(folder / "pid") is None:
            if _reaped(child) or time.monotonic() > deadline:
                raise CapacityError("the training process did not start", code="not-ready")
            time.sleep(0.005)

    def _look(self, name: str) -> Status:
        folder = self._folder / name
        pid = _number(folder / "pid")
        if pid is None:
            return Status("gone")
        _reaped(pid)
        if members := _members(pid, name):
            if members[0].pid == pid:
                _cap(folder / "log")
                self._stop_overdue(folder)
            else:  # its shell has ended, or was killed alone: what is left holds the device
                _signal(members, signal.SIGKILL)
            return Status("running")
        code = _number(folder / "exit")
        if code != 0 and (folder / "overdue").exists():
            return Status("failed", "deadline", code, _tail(folder / "log"))
        if code is None:
            return Status("evicted", "killed")  # with the whole machine, or its container
        return ended(code, _tail(folder / "log"))

    def _stop_overdue(self, folder: Path) -> None:
        seconds = time.time() - (folder / "pid").stat().st_mtime
        if seconds > self._settings.trainer.max_hours * 3600:
            (folder / "overdue").touch()
            self._stop(folder.name)

    def _stop(self, name: str) -> None:
        pid = _number(self._folder / name / "pid")
        members = [] if pid is None else _members(pid, name)
        if not members:
            return
        told = self._folder / name / "stopped"
        if not told.exists():
            told.touch()  # a second signal might cut the last checkpoint short
            _signal(members, signal.SIGTERM)
        elif time.time() - told.stat().st_mtime >= self._settings.trainer.grace_s:
            _signal(members, signal.SIGKILL)

    def _living(self) -> list[str]:
        pids = ((folder.name, _number(folder / "pid")) for folder in self._folder.glob("*/"))
        # Nobody looks at a run whose job was cancelled: its shell would stay a zombie.
        return [
            name
            for name, pid in pids
            if pid is not None and not _reaped(pid) and _members(pid, name)
        ]

    def _sweep(self) -> None:
        """Forget what ended long ago."""
        for folder in self._folder.glob("*/"):
            if time.time() - folder.stat().st_mtime > KEEP_S and (folder / "exit").exists():
                shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other worker of this machine launches meanwhile."""
        with (self._folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def training_environment(settings: TrainerSettings, own: Mapping[str, str]) -> dict[str, str]:
    """That of this process, without settings that are not for training."""
    kept = {
        name: value
        for name, value in own.items()
        if not name.startswith(PREFIX) or name.startswith(_PASSED_ON)
    }
    # Also what came from asap.toml or the command line, which the process does not see.
    blobs = settings.blobs
    secrets = {"ACCESS_KEY": blobs.access_key, "SECRET_KEY": blobs.secret_key}
    values = {
        "HOME": str(settings.home.expanduser().absolute()),
        "BLOBS__URL": settings.blobs_url,
        "BLOBS__ENDPOINT_URL": blobs.endpoint_url,
        "BLOBS__REGION": blobs.region,
        **{f"BLOBS__{key}": one.get_secret_value() for key, one in secrets.items() if one},
        "TRAINER__MODELS": str(settings.trainer.models) if settings.trainer.models else None,
        "TELEMETRY__LOG_JSON": "true",
    }
    return kept | {f"{PREFIX}{name}": value for name, value in values.items() if value}


def _number(file: Path) -> int | None:
    with suppress(FileNotFoundError, ValueError):  # the shell has not come so far
        return int(file.read_text())
    return None


def _reaped(pid: int) -> bool:
    """Whether a child of this process has ended; it leaves no zombie."""
    with suppress(ChildProcessError):
        return os.waitpid(pid, os.WNOHANG)[0] != 0
    return False


def _members(pid: int, name: str) -> list[psutil.Process]:
    """The living processes of a launch: its shell first, its session, and what they started."""
    try:
        shell = psutil.Process(pid)
        command = shell.cmdline()
        if name in command:
            started = shell.children(recursive=True)
            return [shell, *started, *(p for p in _session(pid) if p not in (shell, *started))]
        if command:
            return []  # a process id that was given away again: ours are long gone
    except psutil.NoSuchProcess:
        pass
    return _session(pid)  # one that has just ended has no command line


def _session(leader: int) -> list[psutil.Process]:
    found = []
    # Not process_iter: it keeps processes whose ids have gone to others since.
    for pid in psutil.pids():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(pid) == leader:
                process = psutil.Process(pid)
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
    return found


def _signal(members: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in members:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _cap(log: Path) -> None:
    """Drop the older half of a log that has grown too long; its writer only ever appends."""
    with suppress(FileNotFoundError):
        if log.stat().st_size > LOG_CAP:
            with log.open("r+b") as stream:
                stream.seek(-LOG_CAP // 2, os.SEEK_END)
                newer = stream.read()
                stream.truncate(0)
            with log.open("ab") as stream:
                stream.write(newer)


def _tail(log: Path) -> tuple[str, ...]:
    with suppress(FileNotFoundError), log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - LOG_BYTES))
        return own_lines(stream.read().decode(errors="replace"))
    return ()
