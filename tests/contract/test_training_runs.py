"""The true training command on both launchers: a tiny run, to the model in the registry."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import fsspec
import pytest
from moto.moto_server.threaded_moto_server import ThreadedMotoServer

from asap.runs import TrainRun
from asap.train_config import TrainConfig
from asap_runtime.blobs import open_blobs
from asap_runtime.database import Database, open_engine
from asap_runtime.migrate import upgrade
from asap_runtime.models import ModelRegistry
from asap_runtime.run_files import RunFiles
from asap_runtime.stage import Done, Wait
from asap_trainer import manifest
from asap_trainer.kubernetes_jobs import KubernetesLauncher
from asap_trainer.local import LocalLauncher
from asap_trainer.settings import TrainerSettings
from asap_trainer.stage import TrainStage
from kubernetes_server import KubernetesServer
from training_program import (
    TENANT,
    Program,
    cluster_settings,
    idle,
    local_settings,
    train_run,
    until,
)
from waiting import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

KEYS = {"access_key": "key", "secret_key": "secret"}
CONFIG = TrainConfig(
    preset="demo", backend="plain", max_steps=6, accumulation=1, save_every=3, log_every=1
)


@pytest.fixture
def registry(tmp_path):
    url = f"sqlite:///{tmp_path / 'asap.db'}"
    upgrade(url)
    database = Database(open_engine(url))
    yield ModelRegistry(database)
    database.close()


@pytest.fixture
def program(tmp_path):
    program = Program.made(tmp_path / "program")
    yield program
    program.kill()


@pytest.fixture
def bucket():
    port = free_port()
    server = ThreadedMotoServer("127.0.0.1", port)
    server.start()
    endpoint = f"http://127.0.0.1:{port}"
    files = fsspec.filesystem(
        "s3", key="key", secret="secret", client_kwargs={"endpoint_url": endpoint},
        skip_instance_cache=True,
    )  # fmt: skip
    files.mkdir("training-runs")
    yield {"url": "s3://training-runs/asap", "endpoint_url": endpoint, **KEYS}
    server.stop()


def prepared(settings, config) -> tuple:
    """The blobs of the settings, and a run whose data lies there."""
    blobs, run = open_blobs(settings), train_run(config=config)
    rows = [
        {"id": str(n), "question": f"{n} + 1?", "cot": f"It is {n + 1}.", "answer": str(n + 1)}
        for n in range(8)
    ]
    data = "\n".join(map(json.dumps, rows))
    RunFiles(blobs, run.prefix).write("data.jsonl", data.encode())
    return blobs, run


async def finished(stage, run, after_look=None) -> TrainRun:
    while isinstance(result := await stage.process(run), Wait):
        run = result.payload
        if after_look is not None:
            await after_look(run)
        await asyncio.sleep(result.seconds)
    assert isinstance(result, Done)
    return result.payload


def recorded(registry, run):
    """The one version that the run has made."""
    [version] = registry.list(TENANT)
    assert version.job_id == run.id
    assert version.manifest_sha256 == run.result.model_sha256
    return version


async def test_a_process_trains_and_its_model_is_registered(tmp_path, registry, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = TrainerSettings(
        home=tmp_path, trainer={"poll_s": 0.2}, blobs={"min_free_share": 0.0}
    )
    blobs, run = prepared(settings, CONFIG)
    stage = TrainStage(settings, blobs=blobs, registry=registry)
    run = await finished(stage, run)
    assert run.launch.attempt == 0
    assert run.result.steps == CONFIG.max_steps
    assert run.progress.phase == "done"
    recorded(registry, run)
    await idle(stage)


def held_at_its_checkpoint(folder) -> tuple[str, Path]:
    """An interpreter whose training goes no further than its first checkpoint before there is a
    file; both.
    """
    folder.mkdir()
    python, held, lost = (folder / name for name in ("python", "held.py", "lost"))
    held.write_text(f"""
import pathlib, sys, time
from asap_trainer.loop import _Watch
from asap_trainer.train import main
begin = _Watch.on_step_begin
def begins(self, args, state, control, **options):
    while state.global_step == {CONFIG.save_every} and not pathlib.Path({str(lost)!r}).exists():
        time.sleep(0.02)
    begin(self, args, state, control, **options)
_Watch.on_step_begin = begins
sys.exit(main(sys.argv[1:]))
""")
    python.write_text(f'#!/bin/sh\nshift 2\nexec "{sys.executable}" "{held}" "$@"\n')
    python.chmod(0o755)
    return str(python), lost


@pytest.mark.contract
async def test_a_job_that_loses_its_node_goes_on_from_its_checkpoint(tmp_path, registry, bucket):
    python, gone = held_at_its_checkpoint(tmp_path / "held")
    async with KubernetesServer(tmp_path / "cluster", python=python) as cluster:
        cluster.secrets["for-runs"] = {
            "OMP_NUM_THREADS": "1",
            **{f"ASAP_BLOBS__{name.upper()}": value for name, value in KEYS.items()},
        }
        kubernetes = {
            "kubeconfig": cluster.kubeconfig, "image": "asap:1", "env_secrets": ["for-runs"],
        }  # fmt: skip
        group = {"launcher": "kubernetes", "poll_s": 0.2, "kubernetes": kubernetes}
        settings = TrainerSettings(home=tmp_path, blobs=bucket, trainer=group)
        blobs, run = prepared(settings, CONFIG)
        lost = []

        async def lose_the_node(run):
            stored = RunFiles(blobs, run.prefix).complete_folders("checkpoints")
            if not lost and stored:
                lost.append(await cluster.running(run.launch.name))
                await cluster.remove("pods", lost[0])
                gone.touch()

        run = await finished(
            TrainStage(settings, blobs=blobs, registry=registry), run, lose_the_node
        )
    assert lost
    assert run.launch.attempt == 1
    assert run.progress.resumed_from >= CONFIG.save_every
    assert run.result.steps == CONFIG.max_steps
    recorded(registry, run)


def ranks(starts) -> list[tuple]:
    """Rank and size of the world of each process that torchrun began."""
    assert all(start["arguments"][-2:] == ["--run", train_run().prefix] for start in starts)
    return sorted((start["env"]["RANK"], start["env"]["WORLD_SIZE"]) for start in starts)


async def test_several_devices_are_a_process_each(tmp_path, program, monkeypatch):
    """The true torchrun, with the program in place of the training process."""
    monkeypatch.setenv("PYTHON_EXEC", program.python)
    launcher = LocalLauncher(local_settings(tmp_path, sys.executable))
    run = train_run(config=TrainConfig(backend="plain", gpus=2))
    launch = await launcher.launch(run, 0)
    assert ranks(await program.begun(2)) == [("0", "2"), ("1", "2")]
    program.end(0)
    await until(launcher, launch, "succeeded")


async def test_the_processes_of_several_nodes_meet(tmp_path, program, monkeypatch):
    monkeypatch.setattr(manifest, "PORT", free_port())
    async with KubernetesServer(tmp_path / "cluster") as cluster:
        cluster.secrets["for-runs"] = {"PYTHON_EXEC": program.python}
        kubernetes = {"env_secrets": ["for-runs"]}
        settings = cluster_settings(tmp_path, cluster.kubeconfig, kubernetes=kubernetes)
        launcher = KubernetesLauncher(settings)
        run = train_run(config=TrainConfig(backend="plain", gpus=1, nodes=2))
        launch = await launcher.launch(run, 0)
        assert ranks(await program.begun(2)) == [("0", "2"), ("1", "2")]
        program.end(0)
        await until(launcher, launch, "succeeded")
