"""Settings of the trainer role: where runs are carried out, and what they may take there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, StringConstraints, model_validator

from asap.errors import InvalidInput
from asap_runtime.settings import Group, RuntimeSettings

__all__ = ["KubernetesSettings", "LaunchSettings", "TrainerSettings", "check_base"]

_HUB = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[1-9][0-9]*)?")
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$")]
Quantity = Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?(m|[kMGT]i?)?$")]


class KubernetesSettings(Group):
    """The Job of a run. Secrets by name only: the cluster gives their values to the pod."""

    namespace: Name = "default"
    instance: Name = "asap"
    """Label of all Jobs of this installation; others in the namespace are left alone."""
    kubeconfig: Path | None = None
    """Default: the service account of the pod that this process runs in."""
    image: str | None = None
    gpu_resource: str = "nvidia.com/gpu"
    cpu: Quantity = "8"
    memory: Quantity = "64Gi"
    shm_size: Quantity = "8Gi"
    """Of /dev/shm; counts as memory."""
    disk: Quantity = "100Gi"
    """Ephemeral storage: checkpoints on their way, downloaded weights without a cache."""
    service_account: Name | None = None
    priority_class: Name | None = None
    tolerations: tuple[dict[str, JsonValue], ...] = ()
    node_selector: dict[str, str] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)
    """Further labels of the Job, such as the queue of a queueing controller."""
    suspend: bool = False
    """Create Jobs suspended: a queueing controller starts them."""
    model_cache_claim: Name | None = None
    """Volume claim for downloaded weights, mounted at /models."""
    env_secrets: tuple[Name, ...] = ()
    """Secrets whose entries become the run's environment, such as ASAP_BLOBS__SECRET_KEY."""
    image_pull_secrets: tuple[Name, ...] = ()
    ttl_s: int = Field(86400, ge=60)
    """How long a Job that has ended stays to be looked at."""


class LaunchSettings(Group):
    """How runs are launched and followed."""

    launcher: Literal["subprocess", "kubernetes"] = "subprocess"
    concurrency: int = Field(1, ge=1)
    """Runs at the same time on this machine; on Kubernetes its quota decides."""
    poll_s: float | None = Field(None, gt=0)
    """How often a run is looked at; default: 2, on Kubernetes 15."""
    work_dir: Path | None = None
    """Folder of the processes: logs, process ids; default: `trainer` in ASAP_HOME."""
    python: str | None = None
    """What runs the training process on this machine; default: what runs this one."""
    device_hour_usd: float | None = Field(None, ge=0)
    """What one device costs in an hour; default: runs are free."""
    max_hours: float = Field(168.0, gt=0)
    """Of one launch; then it is stopped and the run fails."""
    max_launches: int = Field(10, ge=1)
    """Of one run: interruptions beyond that fail it."""
    grace_s: float = Field(120.0, ge=0)
    """How long a run that is stopped may take for its last checkpoint."""
    models: Path | None = None
    """The only folder whose models may be named by their path; default: none may."""
    kubernetes: KubernetesSettings = KubernetesSettings()

    @property
    def period_s(self) -> float:
        """How often a run is looked at, with the default filled in."""
        return self.poll_s or (2.0 if self.launcher == "subprocess" else 15.0)


class TrainerSettings(RuntimeSettings):
    """The trainer role's settings."""

    trainer: LaunchSettings = LaunchSettings()

    @property
    def work_dir(self) -> Path:
        """Folder of the training processes on this machine, with the default filled in."""
        return (self.trainer.work_dir or self.home / "trainer").expanduser().absolute()

    @model_validator(mode="after")
    def _check_cluster(self) -> Self:
        """What every Job would fail by."""
        if self.trainer.launcher == "kubernetes":
            if self.trainer.kubernetes.image is None:
                raise ValueError("launcher kubernetes needs trainer.kubernetes.image")
            if not self.blobs_url.lower().startswith("s3://"):
                raise ValueError("launcher kubernetes needs blobs.url on s3://: pods share no disk")
        return self


def check_base(base: str, models: Path | None) -> None:
    """Raise InvalidInput unless `base` is a hub or registry name, or a path inside of `models`."""
    if _HUB.fullmatch(base):
        return
    path = Path(base)
    if models is None or not path.is_absolute():
        raise _refused("expected the name of a model; paths are not allowed here")
    if ".." in path.parts or not path.resolve().is_relative_to(models.expanduser().resolve()):
        raise _refused("expected a path inside of the server's folder of models")


def _refused(reason: str) -> InvalidInput:
    detail = f"the base model cannot be used: {reason}"
    return InvalidInput(detail, errors=[{"pointer": "/base", "detail": detail}])
