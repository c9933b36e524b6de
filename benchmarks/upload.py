"""A big JSONL file through POST /jobs/upload into a gateway process on SQLite: memory and time.

The gateway has no stages: what is measured is taking in. Its memory is read from the system while
it works, so that a peak between two moments is not missed.

python benchmarks/upload.py [--mb N]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
from live import free_port
from report import show, traces

START_S = 60.0


def write_file(path: Path, megabytes: int) -> int:
    """Real traces over and over, each with its own question, until the size is reached; lines."""
    rows = traces()
    lines = 0
    with path.open("w", encoding="utf-8") as stream:
        while stream.tell() < megabytes * 2**20:
            row = rows[lines % len(rows)]
            triple = {name: row[name] for name in ("question", "cot", "answer")}
            triple["question"] = f"{lines} {triple['question']}"
            stream.write(json.dumps(triple) + "\n")
            lines += 1
    return lines


def memory_mb(pid: int, name: str) -> float:
    """A line of the process's status: VmRSS now, VmHWM at most so far."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if name in line) / 1024


def wait_ready(url: str) -> None:
    """Until the gateway answers."""
    ends = time.monotonic() + START_S
    while True:
        try:
            httpx.get(f"{url}/readyz").raise_for_status()
            return
        except httpx.HTTPError:
            if time.monotonic() > ends:
                raise
        time.sleep(0.1)


def measure(file: Path, home: Path, lines: int) -> tuple[str, ...]:
    """One row: upload the file and wait until all of its lines are items."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ASAP_")}
    environment |= {"ASAP_HOME": str(home), "ASAP_TELEMETRY__LOG_LEVEL": "error"}
    command = [sys.executable, "-m", "asap_cli.main", "gateway", "--port", str(port)]
    gateway = subprocess.Popen(command, env=environment, cwd=home)
    try:
        wait_ready(url)
        before_mb = memory_mb(gateway.pid, "VmRSS")
        started = time.perf_counter()
        with file.open("rb") as stream:
            answer = httpx.post(f"{url}/jobs/upload", files={"file": stream}, timeout=3600)
        assert answer.status_code == 202, answer.text
        answered = time.perf_counter()
        job = answer.json()
        while job["phase"] == "validating":
            time.sleep(0.2)
            job = httpx.get(f"{url}/jobs/{job['id']}", timeout=60).json()
        taken_in = time.perf_counter()
        assert job["phase"] in ("queued", "running"), job
        assert job["total"] == lines, f"{job['total']} items of {lines} lines"
        peak_mb = memory_mb(gateway.pid, "VmHWM")
    finally:
        gateway.kill()
        gateway.wait()
    return (
        f"{file.stat().st_size / 2**20:,.0f}",
        f"{lines:,}",
        f"{answered - started:.1f}",
        f"{taken_in - started:.1f}",
        f"{lines / (taken_in - started):,.0f}",
        f"{before_mb:.0f}",
        f"{peak_mb:.0f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=1024)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="asap-upload-") as folder:
        file, home = Path(folder) / "triples.jsonl", Path(folder) / "home"
        home.mkdir()
        lines = write_file(file, given.mb)
        row = measure(file, home, lines)
    show(
        "Upload of a JSONL file, gateway process, SQLite",
        (
            "MB",
            "lines",
            "202 after s",
            "taken in after s",
            "items /s",
            "idle RSS MB",
            "peak RSS MB",
        ),
        [row],
    )


if __name__ == "__main__":
    main()
