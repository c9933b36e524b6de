"""A real vLLM server on the CPU for contract tests.

Starting takes 25 to 75 s on two cores, so a test run starts one server and shares it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from waiting import free_port

START_S = 240.0
"""Longest wait for `/health`; a busy machine with two cores needs more than the usual minute."""
STOP_S = 20.0


@dataclass(frozen=True)
class VllmServer:
    """Where the server listens and what it calls its model."""

    base_url: str
    model: str
    log: Path


def missing() -> str | None:
    """Why vLLM cannot be started here, or None."""
    try:
        version = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return "vllm is not installed: run tests/engines/install.sh PYTHON"
    if "cpu" not in version:
        return f"vllm {version} is not the CPU build that these tests start"
    return None


@contextmanager
def serve(directory: Path, *, model: str = "tiny") -> Iterator[VllmServer]:
    """Serve the model in `directory` under the name `model` until the block ends.

    The whole process group is ended: vLLM's engine is a child that outlives a killed parent.
    """
    scratch = Path(tempfile.mkdtemp(prefix="vllm-"))
    server = VllmServer(f"http://127.0.0.1:{free_port()}/v1", model, scratch / "server.log")
    with server.log.open("wb") as log:
        process = subprocess.Popen(
            _command(directory, server),
            env=os.environ | _ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=scratch,
            start_new_session=True,
        )
    try:
        _wait_until_healthy(process, server)
        yield server
    finally:
        _end(process)
        shutil.rmtree(scratch, ignore_errors=True)


_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default takes half of the machine
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


def _command(directory: Path, server: VllmServer) -> list[str]:
    port = server.base_url.rsplit(":", 1)[1].split("/")[0]
    return [
        str(Path(sys.executable).with_name("vllm")),
        *("serve", str(directory), "--served-model-name", server.model),
        *("--host", "127.0.0.1", "--port", port),
        *("--dtype", "bfloat16", "--max-model-len", "4096"),
        # A random model would fill a reply with the blanks that JSON allows between tokens.
        *("--structured-outputs-config", '{"disable_any_whitespace": true, "backend": "xgrammar"}'),
        "--enforce-eager",  # compiling costs more than it saves on a model of this size
    ]


def _wait_until_healthy(process: subprocess.Popen[bytes], server: VllmServer) -> None:
    health = server.base_url.removesuffix("/v1") + "/health"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"vLLM ended with {process.returncode}:\n{_tail(server.log)}")
        try:
            with direct.open(health, timeout=30):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise RuntimeError(f"vLLM is not healthy after {START_S:.0f} s:\n{_tail(server.log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-40:])


def _end(process: subprocess.Popen[bytes]) -> None:
    for end in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, end)
        except ProcessLookupError:
            break
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
