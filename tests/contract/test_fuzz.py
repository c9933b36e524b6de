"""The whole OpenAPI under random and stateful requests against a running server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys

import httpx
import pytest

from evaluation_stages import write_benchmarks
from waiting import free_port, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def server(tmp_path):
    port = free_port()
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

    def is_ready():
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{url}/readyz").status_code == 200
        return False

    try:
        asyncio.run(until(is_ready))
        yield url
    finally:
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
        timeout=500,
    )
    assert ran.returncode == 0, ran.stdout[-6000:]
    log = (tmp_path / "log").read_text()
    assert "request.crashed" not in log
