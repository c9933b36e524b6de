"""The Kubernetes objects of a run, as plain data; and the command that both launchers run.

One node is one pod. Several nodes are an Indexed Job whose pods find each other by the name of pod
0, which a headless Service makes known.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

from asap.runs import TrainRun
from asap_trainer.launcher import launch_name
from asap_trainer.settings import TrainerSettings

__all__ = ["identity", "job_manifest", "selector", "service_manifest", "train_command"]

Object = dict[str, Any]

CONTAINER = "train"
UID = 10001
WORK, MODELS, TEMPORARY, SHARED = "/work", "/models", "/tmp", "/dev/shm"
PORT = 29500
_REFUSED = 78
_HASH = 16


def train_command(
    run: TrainRun, python: str, grace_s: float, rendezvous: str | None = None
) -> list[str]:
    """The training process; one for each device by torchrun where there are several.

    Args:
        run: what is trained.
        python: the interpreter.
        grace_s: time for a last checkpoint, which torchrun would cut to 30 s.
        rendezvous: where the processes of several nodes meet, HOST:PORT.
    """
    module, arguments = "asap_trainer.train", ["--run", run.prefix]
    config = run.config
    if config.gpus <= 1 and config.nodes == 1:
        return [python, "-m", module, *arguments]
    program = ["-m", "--", module, *arguments]  # or torchrun would take --run for its own
    torchrun = [
        *(python, "-m", "torch.distributed.run"),
        f"--nproc-per-node={config.gpus}",
        f"--shutdown-timeout={math.ceil(grace_s)}",
    ]
    if rendezvous is None:
        return [*torchrun, "--standalone", *program]
    return [
        *torchrun,
        f"--nnodes={config.nodes}",
        "--node-rank=$(JOB_COMPLETION_INDEX)",
        "--rdzv-backend=static",
        f"--rdzv-endpoint={rendezvous}",
        *program,
    ]


def selector(settings: TrainerSettings) -> dict[str, str]:
    """The labels that all Jobs of this installation have, and no other objects."""
    return {
        "app.kubernetes.io/name": "asap",
        "app.kubernetes.io/instance": settings.trainer.kubernetes.instance,
        "app.kubernetes.io/component": "training",
    }


def identity(run: TrainRun, attempt: int) -> dict[str, str]:
    """The labels that say whose work an object is."""
    tenant = hashlib.sha256(run.tenant.encode()).hexdigest()[:_HASH]
    return {"asap/run": run.id, "asap/attempt": str(attempt), "asap/tenant": tenant}


def job_manifest(run: TrainRun, attempt: int, settings: TrainerSettings) -> Object:
    """The batch/v1 Job of one attempt. Pods that were evicted are replaced by the Job itself; all
    else that ends is ours to judge, so it never tries again on its own.
    """
    group, nodes = settings.trainer, run.config.nodes
    name, cluster = launch_name(run.id, attempt), group.kubernetes
    labels = selector(settings) | identity(run, attempt)
    several = {"completions": nodes, "parallelism": nodes, "completionMode": "Indexed"}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": name,
            "namespace": cluster.namespace,
            "labels": cluster.labels | labels,
        },
        "spec": {
            "backoffLimit": 0,
            "activeDeadlineSeconds": math.ceil(group.max_hours * 3600),
            "ttlSecondsAfterFinished": cluster.ttl_s,
            "suspend": cluster.suspend,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {
                "rules": [
                    {
                        "action": "Ignore",
                        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                    },
                    {
                        "action": "FailJob",
                        "onExitCodes": {
                            "containerName": CONTAINER,
                            "operator": "In",
                            "values": [_REFUSED],
                        },
                    },
                ]
            },
            **(several if nodes > 1 else {}),
            "template": {
                "metadata": {"labels": labels},
                "spec": _pod(run, name, settings),
            },
        },
    }


def service_manifest(
    run: TrainRun, attempt: int, settings: TrainerSettings, job_uid: str
) -> Object:
    """The headless Service by which the pods of several nodes meet; it goes with its Job."""
    name = launch_name(run.id, attempt)
    labels = selector(settings) | identity(run, attempt)
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": job_uid}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": name,
            "namespace": settings.trainer.kubernetes.namespace,
            "labels": labels,
            "ownerReferences": [owner],
        },
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,  # they meet before they are ready for anything
            "selector": labels,
            "ports": [{"name": "rendezvous", "port": PORT}],
        },
    }


def _pod(run: TrainRun, name: str, settings: TrainerSettings) -> Object:
    cluster, claim = settings.trainer.kubernetes, settings.trainer.kubernetes.model_cache_claim
    cache: Object = {"persistentVolumeClaim": {"claimName": claim}} if claim else {"emptyDir": {}}
    optional = {
        "serviceAccountName": cluster.service_account,
        "priorityClassName": cluster.priority_class,
        "tolerations": list(cluster.tolerations),
        "nodeSelector": cluster.node_selector,
        "imagePullSecrets": [{"name": secret} for secret in cluster.image_pull_secrets],
        "subdomain": name if run.config.nodes > 1 else None,
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": math.ceil(settings.trainer.grace_s),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": UID,
            "runAsGroup": UID,
            "fsGroup": UID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(run, name, settings)],
        "volumes": [
            {"name": "work", "emptyDir": {}},
            {"name": "tmp", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": cluster.shm_size}},
            {"name": "models", **cache},
        ],
        **{key: value for key, value in optional.items() if value},
    }


def _container(run: TrainRun, name: str, settings: TrainerSettings) -> Object:
    cluster, gpus = settings.trainer.kubernetes, run.config.gpus
    rendezvous = f"{name}-0.{name}:{PORT}" if run.config.nodes > 1 else None
    resources = {
        "cpu": cluster.cpu,
        "memory": cluster.memory,
        "ephemeral-storage": cluster.disk,
        **({cluster.gpu_resource: str(gpus)} if gpus else {}),
    }
    mounts = {"work": WORK, "tmp": TEMPORARY, "shm": SHARED, "models": MODELS}
    return {
        "name": CONTAINER,
        "image": cluster.image,
        "command": train_command(run, "python", settings.trainer.grace_s, rendezvous),
        "workingDir": WORK,
        "env": [{"name": key, "value": value} for key, value in _environment(settings).items()],
        "envFrom": [{"secretRef": {"name": secret}} for secret in cluster.env_secrets],
        "resources": {"requests": resources, "limits": resources},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": key, "mountPath": path} for key, path in mounts.items()],
    }


def _environment(settings: TrainerSettings) -> dict[str, str]:
    """What is no secret. Keys come from the secrets that the settings name."""
    blobs, models = settings.blobs, settings.trainer.models
    values = {
        "ASAP_HOME": f"{WORK}/home",
        "ASAP_BLOBS__URL": settings.blobs_url,
        "ASAP_BLOBS__ENDPOINT_URL": blobs.endpoint_url,
        "ASAP_BLOBS__REGION": blobs.region,
        "ASAP_TRAINER__MODELS": str(models) if models else None,
        "ASAP_TELEMETRY__LOG_JSON": "true",
        "HOME": WORK,
        "HF_HOME": f"{MODELS}/huggingface",
        "TMPDIR": TEMPORARY,
        "USER": "asap",  # the uid has no name in the image, and libraries ask for one
    }
    return {name: value for name, value in values.items() if value}
