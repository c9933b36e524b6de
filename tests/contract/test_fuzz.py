"""The whole OpenAPI under random and stateful requests against a running server."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time

import httpx
import pytest

from evaluation_stages import write_benchmarks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture
def server(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ASAP_")}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "asap_cli.main", "serve", "--port", str(port)],
            env=environment
            | {
                "ASAP_HOME": str(tmp_path / "home"),
                "ASAP_BENCHMARKS": str(write_benchmarks(tmp_path / "benchmarks")),
            },
            cwd=tmp_path,
            stdout=log,
            stderr=log,
        )
    url = f"http://127.0.0.1:{port}"
    for _ in range(300):
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/readyz").status_code == 200:
                break
        time.sleep(0.1)
    yield url
    process.kill()
    process.wait()


def test_no_answer_leaves_the_contract(server, tmp_path):
    """Every check of schemathesis but one: the server may refuse what the schema allows.

    (A configuration is an object in the schema, and a control token is text.)
    """
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{server}/openapi.json"),
            *("--max-examples", "25", "--checks", "all", "--seed", "1"),
            *("--exclude-checks", "positive_data_acceptance"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ran.returncode == 0, ran.stdout[-6000:]
    log = (tmp_path / "log").read_text()
    assert "request.crashed" not in log
