"""Settings of the evaluator role: which server generates, where vLLM is started, what sandboxes
may take.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, model_validator

from asap.errors import InvalidInput
from asap_evaluator.calibration import REFERENCE_CPU_S
from asap_evaluator.sandbox import NOBODY, LevelName
from asap_runtime.settings import Group, RuntimeSettings

__all__ = ["EvaluatorSettings", "GroupOfEvaluator", "VllmSettings", "check_model"]

_HUB = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[1-9][0-9]*)?")


class VllmSettings(Group):
    """The vLLM server that a worker starts for the models of its items, one at a time."""

    program: str | None = None
    """The executable `vllm`; default: that beside this Python, else the one on the path."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """`auto`: cpu where the installed vLLM is its CPU build."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "bfloat16"  # §4.1
    max_model_len: int | None = Field(None, ge=16)
    """Tokens of prompt and completion together; default: what the model allows."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    cpu_kv_cache_gib: int = Field(1, ge=1)
    args: tuple[str, ...] = ()
    """Further arguments of `vllm serve`, such as --tensor-parallel-size=2."""
    start_timeout_s: float = Field(900.0, gt=0)


class GroupOfEvaluator(Group):
    """Generation and grading; a worker that does one of them ignores the settings of the other."""

    base_url: str | None = None
    """Of a vLLM server that runs already, with /v1; default: one is started."""
    served_model: str | None = None
    """What that server calls the model; default: the item's own name for it."""
    tokenizer: str | None = None
    """Hub name or directory that the server has its tokenizer from; default: the item's model."""
    api_key: SecretStr | None = None
    """Of that server."""
    vllm: VllmSettings = VllmSettings()
    concurrency: int = Field(64, ge=1)
    """Requests at the same time."""
    request_timeout_s: float = Field(1500.0, gt=0, le=1700)
    """Of one completion. A call of a stage may take 1,800 s."""
    work_dir: Path | None = None
    """Folder of server logs and fetched models; default: `evaluator` in ASAP_HOME."""
    models: Path | None = None
    """The only folder whose models may be named by their path; default: none may."""
    kept_models: int = Field(3, ge=1)
    """Models of the registry that stay on the disk, the ones used last."""
    sandbox_min_level: LevelName = "landlock"
    """A weaker level than this is not used; programs then wait."""
    sandbox_root: Path | None = None
    """Root folder of the sandboxes, made beforehand; default: one is made at the start."""
    sandbox_uid: int = Field(NOBODY, ge=1000)
    """User that programs run as when the worker is root."""
    sandbox_memory_mib: int = Field(768, ge=64)
    """Of one program, all its processes together."""
    reference_cpu_s: float = Field(REFERENCE_CPU_S, gt=0)
    """What the calibration program takes on the machine that time limits are meant for."""
    grade_concurrency: int | None = Field(None, ge=1)
    """Programs at the same time; default: as many as there are cores."""

    @model_validator(mode="after")
    def _check_server(self) -> Self:
        """A setting of the other kind of server would change nothing, and somebody believes it
        does.
        """
        if self.base_url is None:
            names = ("served_model", "tokenizer", "api_key")
            wrong = [name for name in names if getattr(self, name) is not None]
        else:
            wrong = ["vllm"] if self.vllm != VllmSettings() else []
        if wrong:
            other = "needs base_url" if self.base_url is None else "is of no use with base_url"
            raise ValueError(f"{wrong[0]} {other}; leave it out")
        return self


class EvaluatorSettings(RuntimeSettings):
    """The evaluator role's settings."""

    evaluator: GroupOfEvaluator = GroupOfEvaluator()

    @property
    def evaluator_dir(self) -> Path:
        """Folder of server logs and fetched models, with the default filled in."""
        return (self.evaluator.work_dir or self.home / "evaluator").expanduser().absolute()


def check_model(model: str, models: Path | None) -> None:
    """Raise InvalidInput unless `model` is a hub or registry name, or a path inside of `models`."""
    if _HUB.fullmatch(model):
        return
    path = Path(model)
    inside = models is not None and path.is_absolute() and ".." not in path.parts
    if not inside or not path.resolve().is_relative_to(Path(models or "").expanduser().resolve()):
        detail = (
            "the model cannot be used: expected a name of the hub or the registry, or a path "
            "inside of the server's folder of models"
        )
        raise InvalidInput(detail, errors=[{"pointer": "/model", "detail": detail}])
