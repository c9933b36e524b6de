"""A supervised `vllm serve`: started, adopted, kept alive, and killed with its whole tree.

Knows processes and one HTTP path, `/health`; nothing of evaluations. A server has a folder with its
log and `server.json`, which says which process it is, so that a worker that comes after one that
was killed takes the server over or ends it: a forgotten one holds the device.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

import httpx

from asap.errors import CapacityError, Misconfigured, UpstreamUnavailable
from asap_evaluator.sessions import Leader, ended, leader, living, signal_all
from asap_runtime.logs import get_logger
from asap_runtime.telemetry import GENERATE_SERVER_STARTS

__all__ = ["RETRY_S", "VllmOptions", "VllmServer", "vllm_program"]

LOOK_S = 1.0
"""Between looks at the server."""
HEALTH_S = 10.0
SICK_S = 120.0
"""A server that lives but says nothing for so long is started anew."""
MAX_RESTARTS = 3
"""One after the other, without a minute of health in between."""
WELL_S = 60.0
RETRY_S = 60.0
"""Until a server that does not start may be tried again."""
LOG_CAP = 64 * 2**20
"""Bytes of the log of earlier starts; beyond that it is begun anew."""


@dataclass(frozen=True, slots=True)
class VllmOptions:
    """What is served, and how."""

    model: Path
    """Directory with config, weights and tokenizer."""
    name: str
    """What the server calls the model."""
    host: str = "127.0.0.1"
    port: int | None = None
    """Default: a free one, another at each start."""
    args: tuple[str, ...] = ()
    """Further arguments of `vllm serve`."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Beside that of this process."""
    program: tuple[str, ...] = ()
    """Default: what `vllm_program` finds."""
    start_s: float = 900.0
    """Until it is healthy."""
    stop_s: float = 20.0
    """Between the request to end and the kill."""

    def command(self, port: int) -> list[str]:
        """The command line."""
        return [
            *(self.program or (vllm_program(),)),
            *("serve", str(self.model), "--served-model-name", self.name),
            *("--host", self.host, "--port", str(port)),
            *self.args,
        ]

    def fingerprint(self) -> str:
        """Of all that decides what is served, the model's files by size and time."""
        files = sorted((path.name, path.stat()) for path in self.model.iterdir() if path.is_file())
        stamps = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
        facts = {
            "command": self.command(0),
            "environment": dict(self.environment),
            "model": str(self.model.resolve()),
            "files": stamps,
        }
        canonical = json.dumps(facts, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()


class VllmServer:
    """One server in one folder; one process at a time may hold the folder.

    `start`, then `watch` in a task of its own, then `stop`.
    """

    def __init__(self, options: VllmOptions, folder: Path) -> None:
        self._options, self._folder = options, folder
        self._leader: Leader | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0
        self._lock: IO[str] | None = None
        self._log = get_logger()
        self.up = False
        """Whether it was healthy when it was last looked at."""

    @property
    def url(self) -> str:
        """Where it listens, without a path; another after a restart on a free port."""
        return f"http://{self._options.host}:{self._port}"

    @property
    def log(self) -> Path:
        """What the server prints."""
        return self._folder / "log"

    async def start(self) -> None:
        """`adopt`, else start one and wait until it is healthy.

        Raises Misconfigured without vLLM, CapacityError (`not-ready`) when another process holds
        the folder, UpstreamUnavailable when the server does not become healthy.
        """
        try:
            if not await self.adopt():
                await self._launch()
        except BaseException:
            await asyncio.shield(self.stop())
            raise

    async def adopt(self) -> bool:
        """Hold the folder, and take over the server that runs there if it is the same; another
        one, or a sick one, is ended. Raises CapacityError as `start` does.
        """
        self._hold_folder()
        if (left := self._left()) is None:
            return False
        self._leader, self._port, fingerprint = left
        same = fingerprint == self._options.fingerprint()
        self.up = same and self._options.port in (None, self._port) and await self.healthy()
        if self.up:
            GENERATE_SERVER_STARTS.labels("adopted").inc()
            self._log.info("server.adopted", pid=self._leader.pid)
        else:
            await self._kill()
        return self.up

    async def healthy(self) -> bool:
        """Whether the process lives and answers now."""
        if not self.alive():
            return False
        try:
            async with _client() as client:
                answer = await client.get(f"{self.url}/health")
        except httpx.HTTPError:
            return False
        return answer.status_code == httpx.codes.OK

    def alive(self) -> bool:
        """Whether the process is there."""
        if self._process is not None and self._process.poll() is not None:
            return False
        return self._leader is not None and not ended(self._leader)

    async def watch(self) -> None:
        """Start the server anew whenever it dies or falls silent, until cancelled.

        Raises UpstreamUnavailable after several restarts in a row that came to nothing.
        """
        restarts, since = 0, time.monotonic()
        while True:
            await self._until_unwell()
            if time.monotonic() - since >= WELL_S:
                restarts = 0
            if restarts >= MAX_RESTARTS:
                raise UpstreamUnavailable(
                    f"vLLM died {restarts + 1} times in a row", retry_after_s=RETRY_S
                )
            restarts += 1
            self._log.warning("server.died", restarts=restarts)
            await self._kill()
            with suppress(UpstreamUnavailable):  # it is seen to be dead, and tried again
                await self._launch()
            since = time.monotonic()

    async def stop(self) -> None:
        """End the whole tree and let go of the folder; without effect when nothing runs."""
        await self._kill()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _hold_folder(self) -> None:
        if self._lock is not None:
            return
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (self._folder / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise CapacityError(
                "another process serves from this folder", code="not-ready"
            ) from None
        self._lock = lock

    def _left(self) -> tuple[Leader, int, str] | None:
        """Process, port and fingerprint of what was started here last."""
        try:
            left = json.loads((self._folder / "server.json").read_text())
            first = Leader(int(left["pid"]), str(left["started"]))
            return first, int(left["port"]), str(left["fingerprint"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    async def _launch(self) -> None:
        self._port = self._options.port or _free_port(self._options.host)
        started = time.monotonic()
        self._process = process = self._spawn()
        self._log.info("server.started", pid=process.pid, model=self._options.name)
        outcome = "failed"
        try:
            await self._until_healthy(process)
            outcome, self.up = "ok", True
        finally:
            GENERATE_SERVER_STARTS.labels(outcome).inc()
        seconds = round(time.monotonic() - started, 1)
        self._log.info("server.healthy", model=self._options.name, seconds=seconds)

    def _spawn(self) -> subprocess.Popen[bytes]:
        mode = "ab" if self.log.exists() and self.log.stat().st_size < LOG_CAP else "wb"
        try:
            with self.log.open(mode) as log:
                process = subprocess.Popen(
                    self._options.command(self._port),
                    env={**_own_environment(), **self._options.environment},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=self._folder,
                    start_new_session=True,  # signals to the worker are not for it
                )
        except OSError as error:
            raise Misconfigured(f"vLLM cannot be started: {error.strerror}") from error
        self._leader = leader(process.pid)
        facts = {**asdict(self._leader), "port": self._port}
        record = json.dumps({**facts, "fingerprint": self._options.fingerprint()})
        part = self._folder / "server.json.part"
        part.write_text(record)
        part.replace(self._folder / "server.json")
        return process

    async def _until_healthy(self, process: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + self._options.start_s
        while not await self.healthy():
            if not self.alive():
                raise UpstreamUnavailable(
                    f"vLLM ended with code {process.returncode} while it started; {self.log} of "
                    "the worker has its reasons",
                    retry_after_s=RETRY_S,
                )
            if time.monotonic() > end:
                raise UpstreamUnavailable(
                    f"vLLM was not healthy within {self._options.start_s:.0f} s",
                    retry_after_s=RETRY_S,
                )
            await asyncio.sleep(LOOK_S)

    async def _until_unwell(self) -> None:
        """Return when it is dead, or has not answered for minutes."""
        answered = time.monotonic()
        while self.alive() and time.monotonic() - answered < SICK_S:
            if await self.healthy():
                answered = time.monotonic()
            await asyncio.sleep(LOOK_S)
        self.up = False

    async def _kill(self) -> None:
        """End every process of the server, also those that have outlived its first one."""
        self.up = False
        if (first := self._leader) is None:
            return
        for number, seconds in ((signal.SIGTERM, self._options.stop_s), (signal.SIGKILL, 10.0)):
            signal_all(first, number)
            if await asyncio.to_thread(_gone, first, seconds):
                break
        if self._process is not None:
            await asyncio.to_thread(self._process.wait)
            self._process = None
        (self._folder / "server.json").unlink(missing_ok=True)
        self._leader = None


def vllm_program() -> str:
    """The executable beside this Python, else the one on the path. Raises Misconfigured."""
    beside = Path(sys.executable).with_name("vllm")
    found = str(beside) if beside.is_file() else shutil.which("vllm")
    if found is None:
        raise Misconfigured("vLLM is not installed here; install it, or name a running server")
    return found


def _gone(first: Leader, seconds: float) -> bool:
    """Wait so long at most until nothing of the session lives."""
    end = time.monotonic() + seconds
    while there := living(first):
        if time.monotonic() > end:
            break
        time.sleep(0.05)
    return not there


def _own_environment() -> dict[str, str]:
    """That of this process without settings of ours: keys are none of the server's business."""
    return {name: value for name, value in os.environ.items() if not name.startswith("ASAP_")}


def _free_port(host: str) -> int:
    with suppress(OSError), socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
    raise Misconfigured(f"cannot listen on {host}; name another host")


def _client() -> httpx.AsyncClient:
    """Straight to the server, whatever proxy the environment names; never over TLS."""
    return httpx.AsyncClient(timeout=HEALTH_S, trust_env=False, verify=False)
