"""What the cluster does to a launch: refusals, faults, evictions, and what is not ours."""

from __future__ import annotations

import copy

import pytest

from asap.errors import CapacityError, Misconfigured
from asap.runs import Launch
from asap.train_config import TrainConfig
from asap_trainer import kubernetes_jobs
from asap_trainer.kubernetes_jobs import KubernetesLauncher
from asap_trainer.launcher import launch_name
from kubernetes_server import Fault, KubernetesServer
from training_program import Program, cluster_settings, dead, train_run, until

NAME = launch_name(train_run().id, 0)
LAUNCH = Launch(launcher="kubernetes", name=NAME, attempt=0)
QUOTA = 'jobs.batch "x" is forbidden: exceeded quota: gpus, requested: 1, used: 8, limited: 8'


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
def launcher_with(cluster, tmp_path):
    def make(**trainer):
        return KubernetesLauncher(cluster_settings(tmp_path, cluster.kubeconfig, **trainer))

    return make


@pytest.fixture
def launcher(launcher_with):
    return launcher_with()


async def refused(work):
    with pytest.raises(CapacityError) as error:
        await work
    return error.value


async def test_a_full_quota_is_a_refusal_that_passes(cluster, launcher):
    cluster.faults.append(Fault("POST", "jobs", 403, QUOTA))
    error = await refused(launcher.launch(train_run(), 0))
    assert error.problem_code == "quota-refused"
    assert error.context["retry_after_s"] > 0
    assert await launcher.launch(train_run(), 0) == LAUNCH


@pytest.mark.parametrize("status", [0, 401, 403, 429, 500, 503])
async def test_trouble_of_the_api_can_be_repeated(cluster, launcher, status):
    await launcher.launch(train_run(), 0)
    calls = [
        ("GET", lambda: launcher.look(LAUNCH)),
        ("POST", lambda: launcher.launch(train_run(2), 0)),
        ("DELETE", lambda: launcher.stop(LAUNCH)),
        ("GET", launcher.launched),
        ("GET", launcher.check),
    ]
    for method, call in calls:
        cluster.faults.append(Fault(method, "jobs", status))
        error = await refused(call())
        assert error.problem_code == "cluster-unavailable"
        assert error.retryable


async def test_a_job_whose_creation_was_not_heard_of_is_adopted(cluster, program, launcher):
    for status in (0, 500):
        cluster.faults.append(Fault("POST", "jobs", status, after=True))
    await refused(launcher.launch(train_run(), 0))
    await refused(launcher.launch(train_run(), 0))
    assert await launcher.launch(train_run(), 0) == LAUNCH
    assert len(await program.begun(1)) == 1
    assert cluster.named("jobs") == [NAME]


async def test_what_the_cluster_finds_invalid_is_the_operators_to_mend(cluster, launcher_with):
    wrong = {"tolerations": [{"key": "gpu", "impact": "NoSchedule"}]}
    with pytest.raises(Misconfigured, match="invalid"):
        await launcher_with(kubernetes=wrong).launch(train_run(), 0)
    assert cluster.named("jobs") == []


async def test_a_cluster_that_is_not_configured_is_said_so(tmp_path):
    launcher = KubernetesLauncher(cluster_settings(tmp_path, tmp_path / "missing"))
    with pytest.raises(Misconfigured, match="kubeconfig"):
        await launcher.check()


async def test_a_pod_without_a_node_waits(cluster, launcher, program):
    cluster.pods.scheduling = False
    await launcher.launch(train_run(), 0)
    await cluster.until(lambda: cluster.named("pods"))
    status = await launcher.look(LAUNCH)
    assert (status.phase, status.reason) == ("waiting", "Unschedulable")
    await cluster.schedule()
    await until(launcher, LAUNCH, "running")


async def test_a_suspended_job_waits_until_it_is_let_go(cluster, launcher_with, program):
    launcher = launcher_with(kubernetes={"suspend": True})
    await launcher.launch(train_run(), 0)
    status = await launcher.look(LAUNCH)
    assert (status.phase, status.reason) == ("waiting", "suspended")
    assert await launcher.launched() == [LAUNCH], "it holds a place, and can be stopped"
    await cluster.resume(NAME)
    await until(launcher, LAUNCH, "running")


async def test_a_pod_that_is_evicted_is_replaced_by_its_job(cluster, launcher, program):
    await launcher.launch(train_run(), 0)
    [first] = await program.begun(1)
    await cluster.evict(await cluster.running(NAME))
    await program.begun(2)
    await dead(first["pid"])
    assert (await until(launcher, LAUNCH, "running")).phase == "running"
    program.end(0)
    await until(launcher, LAUNCH, "succeeded")


async def test_a_pod_that_is_deleted_with_its_node_is_an_eviction(cluster, launcher, program):
    await launcher.launch(train_run(), 0)
    await program.begun(1)
    await cluster.remove("pods", await cluster.running(NAME))
    status = await until(launcher, LAUNCH, "evicted")
    assert status.reason == "node-lost"


async def test_a_failed_job_whose_pod_was_lost_is_an_eviction(cluster, launcher, program):
    await launcher.launch(train_run(), 0)
    pod = await cluster.running(NAME)
    cluster.objects["pods", pod]["status"]["reason"] = "NodeLost"
    program.end(1)
    assert (await until(launcher, LAUNCH, "evicted")).reason == "evicted"


async def test_a_job_that_vanished_is_gone(cluster, launcher, program):
    await launcher.launch(train_run(), 0)
    [start] = await program.begun(1)
    await cluster.vanish(NAME)
    assert (await launcher.look(LAUNCH)).phase == "gone"
    await dead(start["pid"])


async def test_stopping_takes_the_pods_along(cluster, launcher, program):
    await launcher.launch(train_run(), 0)
    [start] = await program.begun(1)
    await launcher.stop(LAUNCH)
    assert cluster.named("jobs") == cluster.named("pods") == []
    await dead(start["pid"])


async def test_jobs_of_others_are_left_alone(cluster, launcher, launcher_with):
    other = launcher_with(kubernetes={"instance": "staging"})
    await other.launch(train_run(2), 0)
    assert await launcher.launched() == []
    await launcher.launch(train_run(), 0)
    assert await launcher.launched() == [LAUNCH]
    assert len(await other.launched()) == 1


async def test_a_long_list_comes_in_pages(cluster, launcher, monkeypatch):
    cluster.pods.scheduling = False
    monkeypatch.setattr(kubernetes_jobs, "PAGE", 2)
    for number in range(5):
        await launcher.launch(train_run(number), 0)
    before = len(cluster.calls)
    names = [launch.name for launch in await launcher.launched()]
    assert names == [launch_name(train_run(number).id, 0) for number in range(5)]
    assert len(cluster.calls) - before == 3


async def test_a_list_that_grew_too_old_is_read_anew(cluster, launcher, monkeypatch):
    cluster.pods.scheduling = False
    monkeypatch.setattr(kubernetes_jobs, "PAGE", 2)
    for number in range(3):
        await launcher.launch(train_run(number), 0)
    cluster.faults.append(Fault("GET", "jobs", 410, skip=1))
    assert len(await launcher.launched()) == 3
    assert cluster.faults == []


async def test_a_log_that_cannot_be_had_hides_no_failure(cluster, launcher, program):
    program.end(1)
    await launcher.launch(train_run(), 0)
    await cluster.until(lambda: cluster.objects["jobs", NAME]["status"].get("conditions"))
    cluster.faults.append(Fault("GET", "log", 500))
    status = await launcher.look(LAUNCH)
    assert (status.phase, status.exit_code, status.log) == ("failed", 1, ())
    assert len((await launcher.look(LAUNCH)).log) == 1


async def test_several_nodes_are_an_indexed_job_and_a_service(cluster, launcher, program):
    run = train_run(config=TrainConfig(backend="plain", gpus=1, nodes=3))
    cluster.faults.append(Fault("POST", "services", 500))
    await refused(launcher.launch(run, 0))
    await launcher.launch(run, 0)
    await launcher.launch(run, 0)
    assert cluster.named("services") == cluster.named("jobs") == [NAME]
    starts = await program.begun(3)
    ranks = {part for start in starts for part in start["arguments"] if "node-rank" in part}
    assert ranks == {f"--node-rank={rank}" for rank in range(3)}
    program.end(0)
    await until(launcher, LAUNCH, "succeeded")
    await launcher.stop(LAUNCH)
    assert cluster.named("services") == cluster.named("pods") == []


async def test_the_pod_that_is_to_blame_is_shown(cluster, launcher, program):
    """One node runs out of memory; the others crash for want of it, or are stopped."""
    program.end(1)
    await launcher.launch(train_run(), 0)
    await until(launcher, LAUNCH, "failed")
    [crashed] = [body for (kind, _), body in cluster.objects.items() if kind == "pods"]
    for code in (143, 137, 1):
        other = copy.deepcopy(crashed)
        other["metadata"]["name"] = f"{NAME}-{code}"
        other["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] = code
        await cluster.add("pods", other)
    status = await launcher.look(LAUNCH)
    assert (status.reason, status.exit_code) == ("out-of-memory", 137)
