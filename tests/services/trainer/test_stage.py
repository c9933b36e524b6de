"""The stage on both launchers: from a run that was asked for to one model in the registry."""

from __future__ import annotations

import hashlib
import json

import pytest
from prometheus_client import REGISTRY

from asap.errors import (
    CapacityError,
    InvalidInput,
    Misconfigured,
    NotFound,
    TrainingFailed,
    UpstreamUnavailable,
)
from asap.runs import TrainProgress, TrainResult, TrainRun
from asap.train_config import TrainConfig
from asap_runtime.blobs import BlobStore
from asap_runtime.database import Database, open_engine
from asap_runtime.migrate import upgrade
from asap_runtime.models import ModelRegistry
from asap_runtime.problems import item_problem
from asap_runtime.run_files import RunFiles
from asap_runtime.spending import Spending, charged_to
from asap_runtime.stage import Done, Launching, Wait
from asap_trainer.launcher import launch_name
from asap_trainer.stage import TrainStage
from kubernetes_server import Fault, KubernetesServer
from training_program import (
    SECRET,
    TENANT,
    Program,
    cluster_settings,
    dead,
    idle,
    local_settings,
    train_run,
)

QUOTA = "exceeded quota: gpus"
MANIFEST = b'{"model.safetensors": {"sha256": "...", "bytes": 1}}'
RESULT = TrainResult(
    model_sha256=hashlib.sha256(MANIFEST).hexdigest(),
    steps=20, samples=8, held_out=1, dropped={}, tokens_per_sample=30.0,
    response_tokens_per_sample=20.0, tokens_per_step=120.0, step_seconds=0.5, seconds=10.0,
    loss_first=4.0, loss_last=2.0, data_sha256="0" * 64, template="chatml", base="demo",
    device="cpu", versions={},
)  # fmt: skip


class Trainer:
    """A stage, the files of its runs, and the registry; plays the runner that saves payloads."""

    def __init__(self, stage, blobs, registry, program):
        self.stage, self.program, self.registry = stage, program, registry
        self.blobs = blobs

    def write(self, name: str, data: bytes, run: TrainRun | None = None) -> None:
        RunFiles(self.blobs, (run or train_run()).prefix).write(name, data)

    def progress(self, **fields) -> None:
        self.write("progress.json", TrainProgress(**fields).model_dump_json().encode())

    def finish(self) -> None:
        """What a training process leaves that has come to its end."""
        self.write("model/manifest.json", MANIFEST)
        self.write("result.json", RESULT.model_dump_json().encode())

    async def once(self, run: TrainRun) -> TrainRun:
        """One call that ends with waiting."""
        waits = await self.stage.process(run)
        assert isinstance(waits, Wait)
        assert waits.seconds > 0
        return TrainRun.model_validate_json(waits.payload.model_dump_json())

    async def until(self, run: TrainRun, condition) -> TrainRun:
        while not condition(run):
            run = await self.once(run)
        return run

    async def done(self, run: TrainRun) -> TrainRun:
        """The run at its end, which exactly one version in the registry records."""
        while isinstance(result := await self.stage.process(run), Wait):
            run = result.payload
        assert isinstance(result, Done)
        assert len(self.registry.list(TENANT)) == 1
        return result.payload

    async def failed(self, run: TrainRun) -> TrainingFailed:
        with pytest.raises(TrainingFailed) as error:
            await self.done(run)
        assert self.registry.list(TENANT) == []
        return error.value


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
async def cluster(program, tmp_path):
    async with KubernetesServer(tmp_path / "cluster", python=program.python) as cluster:
        yield cluster


@pytest.fixture
def trainer_with(program, registry, tmp_path):
    blobs = BlobStore.in_folder(tmp_path / "blobs", min_free_share=0.0)

    def make(cluster=None, **trainer):
        settings = (
            cluster_settings(tmp_path, cluster.kubeconfig, **trainer)
            if cluster
            else local_settings(tmp_path, program.python, **trainer)
        )
        return Trainer(
            TrainStage(settings, blobs=blobs, registry=registry), blobs, registry, program
        )

    return make


@pytest.fixture
def local(trainer_with):
    return trainer_with()


@pytest.fixture
def remote(trainer_with, cluster):
    return trainer_with(cluster)


@pytest.fixture(params=["local", "remote"])
def trainer(request):
    return request.getfixturevalue(request.param)


def figure(name, **labels):
    return REGISTRY.get_sample_value(name, labels)


async def test_a_run_becomes_a_model(trainer, program):
    await trainer.stage.ready()
    run = await trainer.once(train_run())
    assert run.launch.name == launch_name(run.id, 0)
    await program.begun(1)
    trainer.finish()
    program.end(0)
    run = await trainer.done(run)
    assert run.result == RESULT
    assert run.meta["version"] == 1
    model = trainer.registry.get(TENANT, "small")
    assert (model.prefix, model.manifest_sha256) == (f"{run.prefix}/model", RESULT.model_sha256)
    assert (model.base, model.job_id) == ("demo", run.id)
    assert model.meta["result"]["loss_last"] == 2.0
    again = await trainer.done(run.grown(result=None))
    assert again.meta["version"] == 1, "the runner may call once more: it is the same version"


async def test_the_training_process_reads_the_run_that_was_asked_for(local):
    run = train_run(meta={"method": "asap"})
    await local.once(run)
    spec = RunFiles(local.blobs, run.prefix).read("spec.json")
    assert TrainRun.model_validate_json(spec) == run


async def test_a_launch_that_was_not_saved_is_found_again(trainer, program):
    await trainer.once(train_run())
    run = await trainer.once(train_run())
    assert run.launch.attempt == 0
    assert len(await program.begun(1)) == 1


async def test_a_model_of_the_registry_is_the_base_of_the_next(local):
    first = {"prefix": "acme/runs/1/model", "manifest_sha256": "f" * 64, "base": "demo"}
    local.registry.add(TENANT, "small", **first, job_id="1" * 32, meta={})
    run = await local.once(train_run(base="small@1"))
    assert run.meta == {"base_prefix": first["prefix"], "base_sha256": first["manifest_sha256"]}
    with pytest.raises(NotFound):
        await local.stage.process(train_run(2, base="small@1", tenant="other"))


async def test_a_base_outside_of_the_models_is_refused(local, program):
    with pytest.raises(InvalidInput, match="base model"):
        await local.stage.process(train_run(base="/etc"))
    assert program.starts == []


async def test_progress_is_saved_and_measured(local):
    run = await local.once(train_run(model="measured"))
    steps = figure("asap_train_steps_total")
    local.progress(step=10, loss=3.5, learning_rate=1e-3, tokens_per_s=120.0, eta_s=60.0)
    run = await local.once(run)
    assert run.progress.step == 10
    local.progress(step=25, loss=2.5, learning_rate=5e-4, tokens_per_s=130.0, mfu=0.4)
    run = await local.once(run)
    local.progress(step=20, loss=2.25)  # it was evicted, and goes on from its checkpoint
    run = await local.once(run)
    assert figure("asap_train_steps_total") - steps == 15
    assert figure("asap_train_loss", model="measured") == 2.25
    await local.stage.cancel(run.id)
    assert figure("asap_train_loss", model="measured") is None


async def test_progress_of_another_version_changes_nothing(local):
    run = await local.once(train_run())
    local.progress(step=3)
    run = await local.once(run)
    local.write("progress.json", b'{"phase": "dreaming"}')
    assert (await local.once(run)).progress.step == 3


async def test_devices_are_paid_by_the_hour(trainer_with):
    trainer = trainer_with(device_hour_usd=3.0)
    run = await trainer.once(train_run())
    spending = Spending()
    with charged_to(spending):
        for phase, written_at in (("training", 1000), ("training", 2200), ("starting", 99000)):
            trainer.progress(phase=phase, written_at=written_at)
            run = await trainer.once(run)
    assert spending.take() == 1_000_000  # 20 minutes; the time without a process is free


@pytest.mark.parametrize(
    ("code", "reason"), [(1, "crashed"), (78, "refused"), (137, "out-of-memory")]
)
async def test_a_bad_end_is_a_problem_with_its_log(trainer, program, code, reason):
    program.end(code)
    error = await trainer.failed(train_run())
    problem = item_problem(error)
    assert problem.code == "training-failed"
    assert problem.context["reason"] == reason
    assert "train.began" in problem.context["log"]
    assert SECRET not in problem.to_json()


async def test_what_the_process_says_of_its_end_is_the_problem(trainer, program):
    problem = {"code": "invalid-input", "detail": "no sample is left", "log": [SECRET]}
    trainer.write("problem.json", json.dumps(problem).encode())
    program.end(78)
    error = await trainer.failed(train_run())
    assert (error.problem_code, error.detail) == ("invalid-input", "no sample is left")
    assert SECRET not in item_problem(error).to_json()


async def test_a_problem_of_an_earlier_attempt_does_not_explain_a_kill(local, program):
    local.write("problem.json", b'{"code": "invalid-input", "detail": "old"}')
    program.end(137)
    assert "memory" in (await local.failed(train_run())).detail


async def test_a_process_that_leaves_no_result_has_failed(trainer, program):
    program.end(0)
    assert (await trainer.failed(train_run())).context["reason"] == "no-result"


async def test_a_model_with_other_files_is_not_registered(local, program):
    local.finish()
    local.write("model/manifest.json", MANIFEST + b" ")
    program.end(0)
    assert (await local.failed(train_run())).problem_code == "checkpoint-invalid"


async def test_an_evicted_run_goes_on_as_the_next_attempt(trainer, program):
    program.end(143)
    run = await trainer.until(train_run(), lambda run: run.launch and run.launch.attempt == 1)
    program.go_on()
    trainer.finish()
    program.end(0)
    await trainer.done(run)


async def test_a_process_that_lost_the_blob_store_is_the_next_attempt(local, program):
    local.write("problem.json", b'{"code": "blob-unavailable", "detail": "away"}')
    program.end(1)
    run = await local.until(train_run(), lambda run: run.launch and run.launch.attempt == 1)
    program.end(0)
    local.finish()
    await local.done(run)


async def test_torchrun_hides_that_its_processes_were_stopped(local, program):
    run = train_run(config=TrainConfig(backend="plain", gpus=2))
    program.end(1)
    run = await local.until(run, lambda run: run.launch and run.launch.attempt == 1)
    local.write("problem.json", b'{"code": "training-failed", "detail": "the loss is no number"}')
    assert (await local.failed(run)).detail == "the loss is no number"


async def test_evictions_have_an_end(trainer_with, program):
    program.end(143)
    error = await trainer_with(max_launches=3).failed(train_run())
    assert error.context["reason"] == "interrupted-too-often"
    assert len(program.starts) == 3


async def test_a_run_is_cancelled_by_its_id(trainer, program):
    run = await trainer.once(train_run())
    assert isinstance(trainer.stage, Launching)
    assert await trainer.stage.launched() == [run.id]
    [start] = await program.begun(1)
    await trainer.stage.cancel(train_run(2).id)
    assert await trainer.stage.launched() == [run.id]
    await trainer.stage.cancel(run.id)
    await dead(start["pid"], start["child"])
    await idle(trainer.stage)
    await trainer.stage.cancel(run.id)


async def test_the_next_worker_goes_on(trainer_with, program):
    run = await trainer_with().once(train_run())
    await program.begun(1)
    later = trainer_with()
    run = await later.once(run)
    later.finish()
    program.end(0)
    await later.done(run)
    assert len(program.starts) == 1


async def test_runs_wait_for_a_place_on_the_machine(local, program):
    await local.once(train_run(1))
    second = await local.once(train_run(2))
    assert second.launch is None
    local.finish()
    program.end(0)
    await local.done(await local.once(train_run(1)))
    second = await local.until(second, lambda run: run.launch)
    assert second.launch.name == launch_name(second.id, 0)


async def test_a_quota_is_waited_for(remote, cluster, program):
    cluster.faults.append(Fault("POST", "jobs", 403, QUOTA))
    run = await remote.once(train_run())
    assert run.launch is None
    run = await remote.once(run)
    assert run.launch.attempt == 0
    remote.finish()
    program.end(0)
    await remote.done(run)
    assert len(program.starts) == 1


async def test_a_job_that_is_there_already_is_adopted(remote, cluster, program):
    cluster.faults.append(Fault("POST", "jobs", 0, after=True))
    with pytest.raises(CapacityError, match="cannot be reached"):
        await remote.stage.process(train_run())
    remote.finish()
    program.end(0)
    await remote.done(train_run())
    assert len(program.starts) == 1


@pytest.mark.parametrize("status", [0, 403, 500])
async def test_an_api_that_is_away_fails_no_run_that_is_under_way(remote, cluster, program, status):
    run = await remote.once(train_run())
    await program.begun(1)
    for _ in range(7):  # more than a runner tries
        cluster.faults.append(Fault("GET", "jobs", status))
        assert await remote.once(run) == run
    remote.finish()
    program.end(0)
    await remote.done(run)
    assert len(program.starts) == 1


async def test_a_blob_store_that_is_away_fails_no_run_that_is_under_way(
    local, program, monkeypatch
):
    run = await local.once(train_run())

    def away(*_):
        raise UpstreamUnavailable("away", code="blob-unavailable")

    with monkeypatch.context() as patched:
        patched.setattr(RunFiles, "read", away)
        assert await local.once(run) == run
    local.finish()
    program.end(0)
    await local.done(run)


async def test_an_evicted_pod_is_replaced_and_the_run_goes_on(remote, cluster, program):
    run = await remote.once(train_run())
    await program.begun(1)
    await cluster.evict(await cluster.running(run.launch.name))
    await program.begun(2)
    remote.finish()
    program.end(0)
    run = await remote.done(run)
    assert run.launch.attempt == 0, "the Job itself has replaced the pod"


async def test_a_lost_node_is_the_next_attempt(remote, cluster, program):
    run = await remote.once(train_run())
    await program.begun(1)
    await cluster.remove("pods", await cluster.running(run.launch.name))
    run = await remote.until(run, lambda run: run.launch.attempt == 1)
    await program.begun(2)
    remote.finish()
    program.end(0)
    await remote.done(run)
    assert len(program.starts) == 2


async def test_a_job_that_vanishes_is_launched_once_more(remote, cluster, program):
    run = await remote.once(train_run())
    await program.begun(1)
    await cluster.vanish(run.launch.name)
    run = await remote.once(run)
    assert run.launch.attempt == 1
    await program.begun(2)
    remote.finish()
    program.end(0)
    await remote.done(run)


async def test_a_job_that_vanishes_twice_has_failed(remote, cluster, program):
    run = await remote.once(train_run())
    for attempt in (1, 2):
        await program.begun(attempt)
        await cluster.vanish(run.launch.name)
        if attempt == 1:
            run = await remote.once(run)
    assert (await remote.failed(run)).context["reason"] == "vanished"
    assert len(program.starts) == 2


async def test_a_job_that_was_through_before_it_vanished_is_done(remote, cluster, program):
    run = await remote.once(train_run())
    await program.begun(1)
    remote.finish()
    await cluster.vanish(run.launch.name)
    await remote.done(run)
    assert len(program.starts) == 1


async def test_a_launcher_that_cannot_work_is_not_ready(trainer_with, cluster):
    cluster.kubeconfig.unlink()
    with pytest.raises(Misconfigured):
        await trainer_with(cluster).stage.ready()


async def test_a_failed_run_that_somebody_retries_is_launched_again(trainer, program):
    program.end(1)
    launched = await trainer.once(train_run())
    await trainer.failed(launched)
    # The payload of a failed item is the one from before: it names the launch that failed.
    again = await trainer.until(launched, lambda run: run.launch.attempt == 1)
    assert again.launch.name != launched.launch.name
    await program.begun(2)
    await trainer.failed(again)
