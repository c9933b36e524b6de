from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import httpx
import pytest

from asap_evaluator.sessions import ended, leader
from live_gateway import live_gateway
from vllm_program import program, starts
from waiting import PATIENCE_S, free_port

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("ASAP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ASAP_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model(tiny_model_dir, tmp_path, monkeypatch):
    """A directory, and a program in vLLM's place."""
    executable = tmp_path / "vllm"
    python, script = program()
    executable.write_text(f'#!/bin/sh\nexec {python} {script} "$@"\n')
    executable.chmod(0o755)
    monkeypatch.setenv("ASAP_EVALUATOR__VLLM__PROGRAM", str(executable))
    return shutil.copytree(tiny_model_dir, tmp_path / "tiny")


@pytest.fixture
def deploy(model):
    """Start `asap deploy` of the directory."""
    running = []

    def start(*options):
        command = [sys.executable, "-m", "asap_cli.main", "deploy", str(model), *options]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        return running[-1]

    yield start
    for process in running:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=2 * PATIENCE_S)


def started(home):
    """What was started by the deployment, in order."""
    [log] = home.rglob("starts.jsonl")
    return starts(log.parent)


def until(process, holds):
    end = time.monotonic() + 2 * PATIENCE_S
    while not (found := holds()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.05)
    return found


@pytest.mark.slow
def test_a_deployed_model_is_reached_through_the_gateway_until_it_leaves(deploy, tmp_path):
    home = tmp_path / "home"
    with live_gateway(home) as gateway:
        process = deploy("--server-args", "--max-model-len 512")
        [there] = until(process, gateway.endpoints.live)
        assert (there.tenant, there.model, there.version) == ("local", "tiny", None)
        assert there.url.startswith("http://127.0.0.1:")

        def served():
            models = httpx.get(f"{gateway.url}/v1/models", timeout=PATIENCE_S).json()["data"]
            return [one["id"] for one in models] == ["tiny"]

        until(process, served)
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
        answer = httpx.post(f"{gateway.url}/v1/chat/completions", json=body, timeout=PATIENCE_S)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"] == "hello"
        [start] = started(home)
        assert "--enable-prefix-caching" in start["args"]
        assert start["args"][-2:] == ["--max-model-len", "512"]
        assert not any(name.startswith("ASAP_") for name in start["env"])

        os.kill(start["pids"][0], signal.SIGKILL)
        until(process, lambda: len(started(home)) == 2)
        moved = until(
            process,
            lambda: [one.url for one in gateway.endpoints.live() if one.url != there.url],
        )
        assert len(moved) == 1
        until(process, lambda: len(gateway.endpoints.live()) == 1)

        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=2 * PATIENCE_S)[1]
        assert process.returncode == 0, said
        assert "tiny is served at http://127.0.0.1:" in said
        assert gateway.endpoints.live() == []
        assert all(ended(leader(pid)) for start in started(home) for pid in start["pids"])


@pytest.mark.slow
def test_a_server_that_does_not_start_is_never_announced(deploy, model, tmp_path):
    (model / "behaviour.json").write_text(json.dumps({"exit": 3}))
    with live_gateway(tmp_path / "home") as gateway:
        process = deploy("--name", "one", "--port", str(free_port()))
        said = process.communicate(timeout=2 * PATIENCE_S)[1]
        assert process.returncode == 69
        assert "ended with code 3" in said
        assert gateway.endpoints.live() == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "name it with --url"),
        (["--url", "http://here:8001/v1", "--port", "8001"], "without a path"),
        (["--url", "http://here:8001"], "needs --port"),
        (["--server-args", "'"], "--server-args"),
    ],
)
def test_wrong_options_are_named_before_anything_starts(asap, model, tmp_path, options, words):
    ran = asap("deploy", model, *options)
    assert ran.code == 65
    assert words in ran.err
    assert not list(tmp_path.rglob("starts.jsonl"))
