from __future__ import annotations

import re

import kubernetes_validate
import pytest
from kubernetes_validate.utils import all_versions

from asap.train_config import TrainConfig
from asap_trainer.manifest import job_manifest, selector, service_manifest, train_command
from asap_trainer.settings import TrainerSettings
from training_program import train_run

VERSIONS = [version for version in sorted(set(all_versions())) if version >= "1.29"]
SHAPES = {
    "cpu": TrainConfig(preset="demo"),
    "one device": TrainConfig(),
    "one node": TrainConfig(backend="plain", gpus=8),
    "nodes": TrainConfig(backend="plain", gpus=8, nodes=4),
}
FULL = {
    "namespace": "training",
    "image": "registry.example/asap@sha256:" + "0" * 64,
    "service_account": "asap-train",
    "priority_class": "batch",
    "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "node_selector": {"gpu": "h100"},
    "labels": {"kueue.x-k8s.io/queue-name": "training", "asap/run": "not ours"},
    "suspend": True,
    "model_cache_claim": "models",
    "env_secrets": ["blob-keys", "hub-token"],
    "image_pull_secrets": ["registry"],
}


def settings(blobs=None, cluster=None, **trainer):
    group = {"launcher": "kubernetes", "kubernetes": cluster or {"image": "asap:1"}, **trainer}
    return TrainerSettings(blobs={"url": "s3://bucket/asap", **(blobs or {})}, trainer=group)


ALL_SETTINGS = {"least": settings(), "full": settings(cluster=FULL, models="/models/base")}


def made(config, chosen=None):
    """Job and Service of a run."""
    run, chosen = train_run(config=config), chosen or settings()
    return job_manifest(run, 2, chosen), service_manifest(run, 2, chosen, "uid")


@pytest.fixture(params=[(s, c) for s in ALL_SETTINGS for c in SHAPES], ids=" ".join)
def job(request):
    """The Job of every shape of run with the least and with all settings."""
    chosen, shape = request.param
    return made(SHAPES[shape], ALL_SETTINGS[chosen])[0]


def container(job):
    [only] = job["spec"]["template"]["spec"]["containers"]
    return only


def test_the_versions_are_those_that_we_promise():
    assert [VERSIONS[0][:4], VERSIONS[-1][:4]] == ["1.29", "1.37"]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_of_kubernetes_knows_every_field(version):
    for chosen in ALL_SETTINGS.values():
        for config in SHAPES.values():
            for body in made(config, chosen):
                kubernetes_validate.validate(body, version, strict=True)


def test_what_ends_is_ours_to_judge(job):
    spec = job["spec"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["backoffLimit"] == 0
    assert spec["podReplacementPolicy"] == "Failed"
    ignore, refused = spec["podFailurePolicy"]["rules"]
    assert ignore["action"] == "Ignore"
    assert ignore["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert refused["action"] == "FailJob"
    codes = refused["onExitCodes"]
    assert codes == {"containerName": container(job)["name"], "operator": "In", "values": [78]}


def test_times_are_those_of_the_settings():
    job, _ = made(SHAPES["cpu"], settings(max_hours=0.5, grace_s=90.2))
    assert job["spec"]["activeDeadlineSeconds"] == 1800
    assert job["spec"]["ttlSecondsAfterFinished"] == 86400
    assert job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 91


def test_the_pod_passes_the_restricted_standard(job):
    pod = job["spec"]["template"]["spec"]
    security = pod["securityContext"]
    assert security["runAsNonRoot"] is True
    assert min(security["runAsUser"], security["runAsGroup"], security["fsGroup"]) >= 10000
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC", "hostUsers"}
    assert container(job)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    kinds = {kind for volume in pod["volumes"] for kind in volume if kind != "name"}
    assert kinds <= {"emptyDir", "persistentVolumeClaim"}


def test_all_that_is_written_has_a_volume(job):
    mounts = {mount["mountPath"]: mount["name"] for mount in container(job)["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in job["spec"]["template"]["spec"]["volumes"]}
    assert set(mounts.values()) == set(volumes)
    variables = {one["name"]: one["value"] for one in container(job)["env"]}
    for name in ("ASAP_HOME", "HOME", "HF_HOME", "TMPDIR"):
        assert variables[name].startswith(tuple(mounts)), name
    assert container(job)["workingDir"] in mounts
    shared = volumes[mounts["/dev/shm"]]["emptyDir"]
    assert shared == {"medium": "Memory", "sizeLimit": "8Gi"}


def test_what_is_asked_for_is_the_limit(job):
    resources = container(job)["resources"]
    assert resources["limits"] == resources["requests"]
    assert {"cpu", "memory", "ephemeral-storage"} <= resources["limits"].keys()


@pytest.mark.parametrize(("shape", "count"), [("cpu", None), ("one device", "1"), ("nodes", "8")])
def test_devices_are_those_of_the_run(shape, count):
    resources = container(made(SHAPES[shape])[0])["resources"]["limits"]
    assert resources.get("nvidia.com/gpu") == count
    sliced = settings(cluster={"image": "asap:1", "gpu_resource": "nvidia.com/mig-3g.40gb"})
    limits = container(made(SHAPES[shape], sliced)[0])["resources"]["limits"]
    assert limits.get("nvidia.com/mig-3g.40gb") == count


def test_names_fit_and_labels_select(job):
    service = made(SHAPES["nodes"], ALL_SETTINGS["full"])[1]
    for body in (job, service):
        assert re.fullmatch(r"[a-z]([a-z0-9-]{0,57}[a-z0-9])?", body["metadata"]["name"])
        for value in body["metadata"]["labels"].values():
            assert re.fullmatch(r"[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?", value)
    labels = job["metadata"]["labels"]
    template = job["spec"]["template"]["metadata"]["labels"]
    assert template.items() <= labels.items()
    assert selector(settings()).items() <= template.items()
    assert labels["asap/run"] == train_run().id, "further labels hide none of ours"
    assert labels["asap/attempt"] == "2"
    assert train_run().tenant not in labels.values()


def test_no_secret_stands_in_a_manifest():
    keys = {"access_key": "planted-access", "secret_key": "planted-secret"}
    job, _ = made(SHAPES["cpu"], settings(blobs=keys, cluster=FULL))
    assert "planted" not in str(job)
    assert container(job)["envFrom"] == [
        {"secretRef": {"name": "blob-keys"}}, {"secretRef": {"name": "hub-token"}},
    ]  # fmt: skip


def test_settings_reach_the_job():
    job, _ = made(SHAPES["cpu"], ALL_SETTINGS["full"])
    pod = job["spec"]["template"]["spec"]
    assert job["spec"]["suspend"] is True
    assert job["metadata"]["namespace"] == "training"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "training"
    assert pod["serviceAccountName"] == "asap-train"
    assert pod["priorityClassName"] == "batch"
    assert pod["tolerations"] == FULL["tolerations"]
    assert pod["nodeSelector"] == {"gpu": "h100"}
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    [models] = [volume for volume in pod["volumes"] if volume["name"] == "models"]
    assert models["persistentVolumeClaim"] == {"claimName": "models"}
    variables = {one["name"]: one["value"] for one in container(job)["env"]}
    assert variables["ASAP_BLOBS__URL"] == "s3://bucket/asap"
    assert variables["ASAP_TRAINER__MODELS"] == "/models/base"


def test_one_pod_is_a_plain_job():
    job, _ = made(SHAPES["one node"])
    assert not job["spec"].keys() & {"completions", "parallelism", "completionMode"}
    assert "subdomain" not in job["spec"]["template"]["spec"]


def test_nodes_meet_at_the_first_pods_name():
    job, service = made(SHAPES["nodes"])
    name, pod = job["metadata"]["name"], job["spec"]["template"]["spec"]
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 4
    assert pod["subdomain"] == service["metadata"]["name"] == name
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    chosen = service["spec"]["selector"]
    assert chosen.items() <= job["spec"]["template"]["metadata"]["labels"].items()
    assert chosen["asap/run"] == train_run().id
    [owner] = service["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["uid"]) == ("Job", name, "uid")
    [port] = service["spec"]["ports"]
    assert f"--rdzv-endpoint={name}-0.{name}:{port['port']}" in container(job)["command"]


def test_the_command_is_as_small_as_the_run():
    program = ["asap_trainer.train", "--run", train_run().prefix]

    def command(shape, rendezvous=None):
        return train_command(train_run(config=SHAPES[shape]), "python", 120.0, rendezvous)

    torchrun = ["python", "-m", "torch.distributed.run"]
    torchrun += ["--nproc-per-node=8", "--shutdown-timeout=120"]
    assert command("cpu") == command("one device") == ["python", "-m", *program]
    assert command("one node") == [*torchrun, "--standalone", "-m", "--", *program]
    assert command("nodes", "host:1") == [
        *torchrun,
        "--nnodes=4",
        "--node-rank=$(JOB_COMPLETION_INDEX)",
        "--rdzv-backend=static",
        "--rdzv-endpoint=host:1",
        "-m",
        "--",
        *program,
    ]
