from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from asap.errors import CapacityError, InvalidInput
from asap.train_config import TrainConfig
from asap_trainer import local
from asap_trainer.launcher import launch_name
from asap_trainer.local import LocalLauncher
from training_program import (
    Program,
    alive,
    dead,
    idle,
    local_settings,
    train_run,
    until,
)

NAME = launch_name(train_run().id, 0)


@pytest.fixture
def program(tmp_path):
    program = Program.made(tmp_path / "program")
    yield program
    program.kill()


@pytest.fixture
def launcher_with(program, tmp_path):
    def make(python=program.python, **trainer):
        return LocalLauncher(local_settings(tmp_path, python, **trainer))

    return make


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "work" / NAME


async def test_a_process_outlives_the_worker_that_started_it(program, launcher_with, tmp_path):
    code = f"""
import asyncio, pathlib
from asap_trainer.local import LocalLauncher
from training_program import local_settings, train_run
settings = local_settings(pathlib.Path({str(tmp_path)!r}), {program.python!r})
asyncio.run(LocalLauncher(settings).launch(train_run(), 0))
"""
    tests = str(Path(__file__).parents[2])
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, env=os.environ | {"PYTHONPATH": tests}
    )
    assert await worker.wait() == 0
    [start] = await program.begun(1)
    launcher = launcher_with()
    [launch] = await launcher.launched()
    assert await launcher.launch(train_run(), 0) == launch
    assert (await launcher.look(launch)).phase == "running"
    assert alive(start["pid"])
    program.end(1)
    assert (await until(launcher, launch, "failed")).exit_code == 1


async def test_a_process_id_that_was_given_away_again_is_nobody_of_ours(launcher_with, folder):
    """After a restart of the machine, or of its container."""
    folder.mkdir(parents=True)
    (folder / "tenant").write_text(train_run().tenant)
    stranger = await asyncio.create_subprocess_exec("sleep", "600", start_new_session=True)
    (folder / "pid").write_text(str(stranger.pid))
    launcher = launcher_with()
    launch = await launcher.launch(train_run(), 0)
    status = await launcher.look(launch)
    assert (status.phase, status.reason) == ("evicted", "killed")
    assert await launcher.launched() == []
    await launcher.stop(launch)
    assert alive(stranger.pid)
    stranger.kill()
    await stranger.wait()


async def test_a_process_that_does_not_listen_is_killed_after_its_grace(program, launcher_with):
    (program.folder / "deaf").touch()
    launcher = launcher_with(grace_s=0.2)
    launch = await launcher.launch(train_run(), 0)
    [start] = await program.begun(1)
    await launcher.stop(launch)
    assert alive(start["pid"])
    await asyncio.sleep(0.25)
    await launcher.stop(launch)
    await dead(start["pid"], start["child"])


async def test_a_second_stop_within_the_grace_changes_nothing(program, launcher_with):
    (program.folder / "deaf").touch()
    launch = await launcher_with().launch(train_run(), 0)
    [start] = await program.begun(1)
    for _ in range(3):
        await launcher_with().stop(launch)  # another worker, too, knows of the first
    assert alive(start["pid"])


async def test_nothing_is_left_when_the_shell_alone_is_killed(program, launcher_with, folder):
    launcher = launcher_with()
    launch = await launcher.launch(train_run(), 0)
    [start] = await program.begun(1)
    os.kill(int((folder / "pid").read_text()), signal.SIGKILL)
    status = await until(launcher, launch, "evicted")
    assert status.reason == "killed"
    await dead(start["pid"], start["child"])


async def test_a_machine_takes_so_many_runs(program, launcher_with):
    launcher = launcher_with(concurrency=2)
    first = await launcher.launch(train_run(1), 0)
    await launcher.launch(train_run(2), 0)
    with pytest.raises(CapacityError) as refused:
        await launcher.launch(train_run(3), 0)
    assert refused.value.problem_code == "quota-refused"
    program.end(0)
    await until(launcher, first, "succeeded")
    await idle(launcher)
    await launcher.launch(train_run(3), 0)


async def test_several_nodes_are_not_one_machine(launcher_with):
    config = TrainConfig(backend="plain", gpus=1, nodes=2)
    with pytest.raises(InvalidInput, match="kubernetes"):
        await launcher_with().launch(train_run(config=config), 0)


async def test_the_process_gets_the_settings_it_needs_and_no_others(
    program, launcher_with, monkeypatch, folder, tmp_path
):
    monkeypatch.setenv("ASAP_DATABASE__URL", "postgresql+psycopg://user:secret@db/asap")
    monkeypatch.setenv("ASAP_LLM__API_KEY", "secret")
    monkeypatch.setenv("ASAP_BLOBS__REGION", "eu-central-1")
    monkeypatch.setenv("HF_HOME", "/cache")
    await launcher_with(models=tmp_path / "models").launch(train_run(), 0)
    [start] = await program.begun(1)
    assert "secret" not in start["env"].values()
    assert not [name for name in start["env"] if name.startswith(("ASAP_DATABASE", "ASAP_LLM"))]
    assert start["env"]["ASAP_BLOBS__URL"] == f"file://{tmp_path}/home/blobs"
    assert start["env"]["ASAP_BLOBS__REGION"] == "eu-central-1"
    assert start["env"]["ASAP_TRAINER__MODELS"] == f"{tmp_path}/models"
    assert start["env"]["HF_HOME"] == "/cache"
    assert Path(start["cwd"]) == folder, "no name of a hub is a folder there"


async def test_a_log_that_grows_loses_its_older_half(program, launcher_with, folder, monkeypatch):
    monkeypatch.setattr(local, "LOG_CAP", 1000)
    launcher = launcher_with()
    launch = await launcher.launch(train_run(), 0)
    await program.begun(1)
    with (folder / "log").open("a") as log:
        log.write("old " * 1000 + "new")
    await launcher.look(launch)
    assert (folder / "log").stat().st_size == 500
    assert (folder / "log").read_text().endswith("new")


async def test_an_interpreter_that_is_missing_fails_the_run(launcher_with):
    launcher = launcher_with(python="/no/such/python")
    launch = await launcher.launch(train_run(), 0)
    status = await until(launcher, launch, "failed")
    assert (status.reason, status.exit_code) == ("crashed", 127)


async def test_what_ended_long_ago_is_forgotten(program, launcher_with, folder, monkeypatch):
    program.end(0)
    launcher = launcher_with()
    await until(launcher, await launcher.launch(train_run(), 0), "succeeded")
    await launcher.launch(train_run(2), 0)
    assert folder.exists()
    monkeypatch.setattr(local, "KEEP_S", 0.0)
    await idle(launcher)
    await launcher.launch(train_run(3), 0)
    assert not folder.exists()


async def test_a_folder_that_cannot_be_written_is_not_ready(launcher_with, tmp_path):
    (tmp_path / "work").write_text("a file")
    with pytest.raises(CapacityError) as refused:
        await launcher_with().check()
    assert refused.value.problem_code == "not-ready"


async def test_no_zombie_is_left(program, launcher_with, folder):
    program.end(0)
    launcher = launcher_with()
    launch = await launcher.launch(train_run(), 0)
    await until(launcher, launch, "succeeded")
    pid = int((folder / "pid").read_text())

    while psutil.pid_exists(pid):
        await launcher.look(launch)
