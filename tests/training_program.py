"""A program that stands for the training process, and the settings and runs to launch it with.

It says when it began, and ends as it is told by a file. Signals end it like the real one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from asap.runs import TrainRun
from asap.train_config import TrainConfig
from asap_trainer.launcher import Status
from asap_trainer.settings import TrainerSettings

SECRET = "the text of a sample"
TENANT = "acme"

_TEXT = """#!{python}
import json, os, pathlib, signal, subprocess, sys, time

folder = pathlib.Path({folder!r})
signal.signal(signal.SIGTERM, lambda *_: (folder / "deaf").exists() or sys.exit(143))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
log = dict(event="train.began", level="info", timestamp="2026-01-01T00:00:00Z", pid=os.getpid())
print(json.dumps(log), file=sys.stderr, flush=True)
print({secret!r}, flush=True)
start = dict(
    pid=os.getpid(), child=child.pid, arguments=sys.argv[1:], cwd=os.getcwd(), env=dict(os.environ)
)
with (folder / "starts").open("a") as starts:
    starts.write(json.dumps(start) + chr(10))
while not (folder / "order").exists():
    time.sleep(0.02)
code = int((folder / "order").read_text())
if code == 137:
    os.kill(os.getpid(), signal.SIGKILL)
child.kill()
child.wait()
sys.exit(code)
"""


@dataclass(frozen=True)
class Program:
    """The program as an interpreter that takes any arguments, and what it has done so far."""

    folder: Path

    @classmethod
    def made(cls, folder: Path) -> Program:
        folder.mkdir()
        text = _TEXT.format(python=sys.executable, folder=str(folder), secret=SECRET)
        (folder / "python").write_text(text)
        (folder / "python").chmod(0o755)
        return cls(folder)

    @property
    def python(self) -> str:
        return str(self.folder / "python")

    @property
    def starts(self) -> list[dict]:
        """One row for each process that began."""
        file = self.folder / "starts"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    async def begun(self, count: int) -> list[dict]:
        """Wait until so many processes have begun in all."""
        await holds(lambda: len(self.starts) >= count)
        return self.starts

    def kill(self) -> None:
        """Leave nothing behind; who is about to begin ends as well."""
        self.end(0)
        for start in self.starts:
            for pid in (start["pid"], start["child"]):
                with contextlib.suppress(psutil.NoSuchProcess):
                    psutil.Process(pid).kill()

    def end(self, code: int) -> None:
        """Whoever runs, and whoever begins later, ends with this code."""
        (self.folder / "order.part").write_text(str(code))
        os.replace(self.folder / "order.part", self.folder / "order")

    def go_on(self) -> None:
        """Whoever begins from now on runs until it is told otherwise."""
        (self.folder / "order").unlink(missing_ok=True)


async def holds(condition: Callable[[], object]) -> None:
    """Wait for something outside of this process."""
    while not condition():  # noqa: ASYNC110 - nobody could tell
        await asyncio.sleep(0.02)


async def until(launcher, launch, *phases) -> Status:
    """How the launch stands as soon as it is in one of the phases."""
    while (status := await launcher.look(launch)).phase not in phases:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    return status


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def idle(place) -> None:
    """Wait until nothing is launched there any more: a process takes a moment to end."""
    while await place.launched():  # noqa: ASYNC110
        await asyncio.sleep(0.02)


async def dead(*pids: int) -> None:
    await holds(lambda: not any(map(alive, pids)))


def train_run(number: int = 1, **fields) -> TrainRun:
    values = {
        "id": f"{number:032x}",
        "tenant": TENANT,
        "config": TrainConfig(preset="demo"),
        "base": "demo",
        "model": "small",
        "data": f"{TENANT}/runs/{number:032x}/data.jsonl",
    }
    return TrainRun(**values | fields)


def local_settings(folder: Path, python: str, **trainer) -> TrainerSettings:
    group = {"python": python, "poll_s": 0.05, "work_dir": folder / "work", **trainer}
    return TrainerSettings(home=folder / "home", trainer=group)


def cluster_settings(folder: Path, kubeconfig: Path, **trainer) -> TrainerSettings:
    kubernetes = {
        "kubeconfig": kubeconfig, "namespace": "training", "image": "registry.example/asap:1",
        **trainer.pop("kubernetes", {}),
    }  # fmt: skip
    group = {"launcher": "kubernetes", "poll_s": 0.05, "kubernetes": kubernetes, **trainer}
    return TrainerSettings(home=folder / "home", blobs={"url": "s3://bucket/asap"}, trainer=group)
