"""`asap serve` as a process of its own, for tests that go the whole way over HTTP."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

from waiting import free_port

PATIENCE_S = 240


class ServerProcess:
    """`asap serve` as a process of its own, and its API."""

    def __init__(self, home: Path, **settings: str) -> None:
        port = free_port()
        self.home, self.log = home, home / "server.log"
        self.url = f"http://127.0.0.1:{port}"
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("ASAP_")},
            "ASAP_HOME": str(home),
            "ASAP_SURPRISAL__MODEL": "demo",
            "ASAP_TRAINER__POLL_S": "0.2",
            "OMP_NUM_THREADS": "1",
            **settings,
            "HF_HUB_OFFLINE": "1",
        }
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "asap_cli.main", "serve", "--port", str(port)],
                env=environment,
                cwd=home,
                stdout=log,
                stderr=log,
            )
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.wait_for("the server", self.is_ready)

    def is_ready(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return self.http.get("/readyz").status_code == 200
        return False

    def close(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(PATIENCE_S)
        self.http.close()
        for pid in self.home.glob("trainer/*/pid"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(pid.read_text()), signal.SIGKILL)

    def get(self, path: str) -> dict:
        return self.http.get(path).raise_for_status().json()

    def post(self, path: str, **request) -> dict:
        answer = self.http.post(path, **request)
        assert answer.is_success, answer.text
        return answer.json()

    def wait_for(self, what: str, condition) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, f"{what}:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.05)
