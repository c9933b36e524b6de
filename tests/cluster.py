"""The platform as processes of its own on real servers, for tests that kill them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx

from waiting import PATIENCE_S, free_port

WORKERS = (("anchor", 1), ("anchor", 2), ("surprisal", 1), ("surprisal", 2))
EXAMPLES = Path(__file__).parents[1] / "examples" / "triples.jsonl"


class Cluster:
    """Processes of `asap`, restarted by name: one gateway or more, two workers of each stage."""

    def __init__(self, folder, database, broker, llm, *, gateways=1):
        self.folder = folder
        self.ports = [free_port() for _ in range(gateways)]
        self.urls = [f"http://127.0.0.1:{port}" for port in self.ports]
        self.url = self.urls[0]
        self._admin_ports = {f"{stage}-{n}": free_port() for stage, n in WORKERS}
        self._environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("ASAP_")},
            "ASAP_HOME": str(folder),
            "ASAP_DATABASE__URL": database,
            "ASAP_QUEUE__URL": broker,
            "ASAP_LLM__BASE_URL": llm,
            "ASAP_LLM__MODEL": "scripted",
            "ASAP_LLM__CONCURRENCY": "8",
            "OMP_NUM_THREADS": "1",
        }
        self.processes = {}

    def start(self, name, *command):
        port = self._admin_ports.get(name)
        own = {} if port is None else {"ASAP_TELEMETRY__ADMIN_PORT": str(port)}
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "asap_cli.main", *command],
                env=self._environment | own,
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )

    def commands(self):
        """Name to command of every process."""
        names = ["gateway", *(f"gateway-{n}" for n in range(2, len(self.ports) + 1))]
        gateways = zip(names, self.ports, strict=True)
        return {
            **{name: ("gateway", "--port", str(port)) for name, port in gateways},
            **{f"{stage}-{n}": ("worker", stage) for stage, n in WORKERS},
        }

    def start_all(self):
        self.start("schema", "db", "upgrade")
        assert self.processes.pop("schema").wait(PATIENCE_S) == 0
        for name, command in self.commands().items():
            self.start(name, *command)
        for port in (*self.ports, *self._admin_ports.values()):
            self.wait_ready(f"http://127.0.0.1:{port}")

    def wait_ready(self, url=None):
        deadline = time.monotonic() + 2 * PATIENCE_S
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url or self.url}/readyz").status_code == 200:
                    return
            time.sleep(0.1)
        raise AssertionError(self._logs())

    def signal(self, name, number):
        process = self.processes[name]
        process.send_signal(number)
        return process.wait(PATIENCE_S)

    def stop(self):
        for process in self.processes.values():
            process.kill()
            process.wait()

    def finished(self, job, seconds=220):
        deadline, state = time.monotonic() + seconds, None
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                state = httpx.get(f"{self.url}/jobs/{job}").json()
                if state.get("phase") == "done":
                    return state
            time.sleep(0.2)
        raise AssertionError(f"{state}\n{self._logs()}")

    def _logs(self):
        return "\n".join(p.read_text()[-800:] for p in self.folder.glob("*.log"))


def submit(cluster, count):
    rows = [json.loads(line) for line in EXAMPLES.read_text().splitlines()]
    short = sorted(rows, key=lambda row: len(row["cot"]))[:8]
    triples = [
        {
            "id": str(i),
            "question": f"{i} {row['question']}",
            "cot": row["cot"],
            "answer": row["answer"],
        }
        for i, row in ((i, short[i % len(short)]) for i in range(count))
    ]
    body = {"triples": triples, "config": {"protocol": "select", "max_tokens": 40}}
    answer = httpx.post(f"{cluster.url}/jobs", json=body, timeout=PATIENCE_S)
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


def results(cluster, job):
    text = httpx.get(f"{cluster.url}/jobs/{job}/result", timeout=60).text
    return [json.loads(line) for line in text.splitlines()]
