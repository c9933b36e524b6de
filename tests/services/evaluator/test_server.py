"""The supervised server, with a real process tree in the place of vLLM's."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from asap.errors import CapacityError, Misconfigured, UpstreamUnavailable
from asap_evaluator import server as module
from asap_evaluator.server import VllmOptions, VllmServer
from asap_evaluator.sessions import ended, leader, signal_all
from vllm_program import program, starts
from waiting import PATIENCE_S, free_port, until

TESTS = Path(__file__).parents[2]
WORKER = """
import asyncio, sys
from pathlib import Path
from asap_evaluator.server import VllmOptions, VllmServer

async def main():
    options = VllmOptions(Path(sys.argv[1]), "m", program=tuple(sys.argv[3:]), start_s=60.0)
    server = VllmServer(options, Path(sys.argv[2]))
    await server.start()
    print("at", server.url, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""
"""A worker that holds a server until it is killed."""


def alive(pid: int) -> bool:
    return not ended(leader(pid))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "LOOK_S", 0.05)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def options(model):
    return VllmOptions(
        model, "m", args=("--flag",), program=program(), start_s=PATIENCE_S, stop_s=0.5
    )


@pytest.fixture
async def server(options, tmp_path):
    server = VllmServer(options, tmp_path / "server")
    yield server
    await server.stop()


@pytest.fixture
def worker(options, tmp_path):
    """A worker that was killed while its server ran; gives the server's address."""
    command = [sys.executable, "-c", WORKER, str(options.model), str(tmp_path / "server")]
    with subprocess.Popen([*command, *program()], stdout=subprocess.PIPE, text=True) as process:
        [url] = [line.split()[1] for line in process.stdout if worker_says(line, process)]
    yield url
    for pid in starts(tmp_path / "server")[0]["pids"]:
        signal_all(leader(pid), signal.SIGKILL)


def worker_says(line: str, process: subprocess.Popen) -> bool:
    """Whether the line tells the address; then the worker has done its part, and is killed."""
    if line.startswith("at "):
        process.kill()
    return line.startswith("at ")


def began(folder: Path) -> bool:
    """Whether a server has told of its start."""
    log = folder / "starts.jsonl"
    return log.exists() and log.read_text().endswith("\n")


def behave(model: Path, **behaviour: object) -> None:
    (model / "behaviour.json").write_text(json.dumps(behaviour))


async def test_a_server_is_started_as_asked_and_ends_with_all_that_it_started(
    server, options, tmp_path, monkeypatch
):
    monkeypatch.setenv("ASAP_EVALUATOR__API_KEY", "secret")
    await server.start()
    assert server.up
    assert await server.healthy()
    [started] = starts(tmp_path / "server")
    port = server.url.rpartition(":")[2]
    assert started["args"] == [
        *("serve", str(options.model), "--served-model-name", "m"),
        *("--host", "127.0.0.1", "--port", port, "--flag"),
    ]
    assert "ASAP_EVALUATOR__API_KEY" not in started["env"], "keys are none of its business"
    assert all(map(alive, started["pids"]))
    await server.stop()
    assert not any(map(alive, started["pids"]))
    assert not server.up
    assert not await server.healthy()


async def test_environment_and_a_port_of_ones_own(options, tmp_path):
    port = free_port()
    own = replace(options, port=port, environment={"VLLM_CPU_KVCACHE_SPACE": "1"})
    second = VllmServer(own, tmp_path / "second")
    await second.start()
    try:
        assert second.url == f"http://127.0.0.1:{port}"
        assert starts(tmp_path / "second")[0]["env"]["VLLM_CPU_KVCACHE_SPACE"] == "1"
    finally:
        await second.stop()


async def test_a_server_that_is_deaf_to_requests_to_end_is_killed(options, model, tmp_path):
    behave(model, deaf=True)
    server = VllmServer(options, tmp_path / "server")
    await server.start()
    await server.stop()
    assert not any(map(alive, starts(tmp_path / "server")[0]["pids"]))


async def test_a_server_that_ends_while_it_starts_says_so_and_lets_go(server, model, tmp_path):
    behave(model, exit=7)
    with pytest.raises(UpstreamUnavailable, match="ended with code 7") as caught:
        await server.start()
    assert caught.value.context["retry_after_s"] > 0
    assert not any(map(alive, starts(tmp_path / "server")[0]["pids"])), "its child as well"
    behave(model)
    await server.start()
    assert server.up


async def test_a_server_that_does_not_become_healthy_is_ended(
    options, model, tmp_path, monkeypatch
):
    class Clock:
        """An hour passes as soon as the server is there."""

        sleep = staticmethod(time.sleep)

        @staticmethod
        def monotonic() -> float:
            return time.monotonic() + (3600 if began(tmp_path / "server") else 0)

    monkeypatch.setattr(module, "time", Clock)
    behave(model, healthy=False)
    server = VllmServer(options, tmp_path / "server")
    with pytest.raises(UpstreamUnavailable, match="not healthy within 60 s"):
        await server.start()
    assert not any(map(alive, starts(tmp_path / "server")[0]["pids"]))


async def test_a_start_that_is_given_up_leaves_nothing(server, model, tmp_path):
    behave(model, healthy=False)
    starting = asyncio.create_task(server.start())
    await until(lambda: began(tmp_path / "server"))
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not any(map(alive, starts(tmp_path / "server")[0]["pids"]))


async def test_a_folder_is_held_by_one(server, options, tmp_path):
    await server.start()
    with pytest.raises(CapacityError) as caught:
        await VllmServer(options, tmp_path / "server").start()
    assert caught.value.problem_code == "not-ready"
    assert server.alive()


async def test_without_vllm_there_is_no_server(options, tmp_path):
    missing = replace(options, program=(str(tmp_path / "missing"),))
    with pytest.raises(Misconfigured, match="cannot be started"):
        await VllmServer(missing, tmp_path / "server").start()


async def test_the_server_of_a_killed_worker_is_taken_over(worker, options, tmp_path):
    [left] = starts(tmp_path / "server")
    same = VllmServer(replace(options, args=()), tmp_path / "server")
    await same.start()
    try:
        assert same.url == worker
        assert len(starts(tmp_path / "server")) == 1
        assert same.up
        os.kill(left["pids"][0], signal.SIGKILL)
        await until(lambda: not same.alive())
    finally:
        await same.stop()
    assert not any(map(alive, left["pids"])), "though it is no child of ours"


@pytest.mark.parametrize("change", ["options", "weights"])
async def test_another_server_that_a_killed_worker_has_left_is_ended(
    worker, server, options, model, tmp_path, change
):
    if change == "weights":  # the same command line, and yet another model
        (model / "model.safetensors").write_bytes(b"new")
        server = VllmServer(replace(options, args=()), tmp_path / "server")
    await server.start()
    try:
        before, after = starts(tmp_path / "server")
        assert not any(map(alive, before["pids"]))
        assert all(map(alive, after["pids"]))
    finally:
        await server.stop()


async def test_what_outlived_a_killed_server_of_a_killed_worker_is_ended(worker, server, tmp_path):
    [left] = starts(tmp_path / "server")
    os.kill(left["pids"][0], signal.SIGKILL)
    await until(lambda: not alive(left["pids"][0]))
    assert alive(left["pids"][1]), "the engine holds the device"
    await server.start()
    assert not alive(left["pids"][1])


@pytest.mark.parametrize("record", ["", "[]", "{}", '{"pid": "x"}'])
async def test_a_damaged_record_is_none(server, tmp_path, record):
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "server.json").write_text(record)
    await server.start()
    assert server.up


@pytest.fixture
def stranger():
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as process:
        yield process
        process.kill()


async def test_a_stranger_with_the_same_process_id_is_left_alone(server, stranger, tmp_path):
    record = {"pid": stranger.pid, "started": "x:1", "port": 1, "fingerprint": "y"}
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "server.json").write_text(json.dumps(record))
    await server.start()
    assert stranger.poll() is None


async def test_a_server_that_dies_is_started_anew_with_nothing_left_of_the_old_one(
    server, tmp_path
):
    await server.start()
    watching = asyncio.create_task(server.watch())
    os.kill(starts(tmp_path / "server")[0]["pids"][0], signal.SIGKILL)
    await until(lambda: len(starts(tmp_path / "server")) == 2 and server.up)
    before, _ = starts(tmp_path / "server")
    assert not any(map(alive, before["pids"]))
    async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE_S) as client:
        assert (await client.get(f"{server.url}/health")).status_code == 200
    watching.cancel()


async def test_a_server_that_is_silent_is_started_anew(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SICK_S", 2.0)
    monkeypatch.setattr(module, "HEALTH_S", 1.0)
    await server.start()
    os.kill(starts(tmp_path / "server")[0]["pids"][0], signal.SIGSTOP)
    watching = asyncio.create_task(server.watch())
    await until(lambda: len(starts(tmp_path / "server")) >= 2 and server.up)
    watching.cancel()
    assert not any(map(alive, starts(tmp_path / "server")[0]["pids"]))


async def test_a_server_that_dies_again_and_again_is_given_up(server, model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_RESTARTS", 1)
    await server.start()
    behave(model, exit=1)
    os.kill(starts(tmp_path / "server")[0]["pids"][0], signal.SIGKILL)
    with pytest.raises(UpstreamUnavailable, match="2 times in a row"):
        async with asyncio.timeout(PATIENCE_S):
            await server.watch()
    assert len(starts(tmp_path / "server")) == 2
    assert not server.up
