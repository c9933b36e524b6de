"""A training run on its way: what was asked for, how it stands, what came of it. Frozen, JSON both
ways.

Everything else of a run lies in the blob store below its prefix, written by the training process
and read by whoever follows it:

    data.jsonl              what is trained on, one record, chat or prompt/completion a line
    spec.json               this run, for the training process
    progress.json           TrainProgress, overwritten every few seconds
    metrics.jsonl           one line of figures for every `log_every` steps
    dropped.jsonl           samples that are not trained on: id, reason, tokens
    problem.json            why the run refused or failed, with the last lines of its log
    checkpoints/step-N/     what a killed run goes on from; manifest.json is written last
    model/                  the result; manifest.json is written last
    result.json             TrainResult
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, JsonValue

from asap.train_config import TrainConfig
from asap.types import Frozen

__all__ = ["Launch", "TrainProgress", "TrainResult", "TrainRun"]


class TrainProgress(Frozen):
    """How a run stands. Unknown figures are None; seconds and bytes; tokens are those trained on,
    padding left out.
    """

    phase: Literal["starting", "preparing", "training", "saving", "done"] = "starting"
    step: int = 0
    total_steps: int | None = None
    epoch: float = 0.0
    loss: float | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None
    tokens_per_s: float | None = None
    step_seconds: float | None = None
    mfu: float | None = None
    """Share of the device's measured matrix rate."""
    peak_memory_bytes: int | None = None
    eta_s: float | None = None
    samples: int | None = None
    dropped: dict[str, int] = Field(default_factory=dict)
    """Samples that are not trained on, by reason."""
    resumed_from: int | None = None
    """Step of the checkpoint that this process went on from."""
    written_at: float = 0.0
    """Seconds since the epoch, by the clock of the training process."""


class TrainResult(Frozen):
    """What a finished run says of itself."""

    model_sha256: str
    """Of the manifest of `model/`."""
    steps: int
    samples: int
    held_out: int
    dropped: dict[str, int]
    tokens_per_sample: float
    """Mean training tokens of a sample, prompt included."""
    response_tokens_per_sample: float
    """Mean tokens that carry loss."""
    tokens_per_step: float
    step_seconds: float
    """Mean over the steps of the last process."""
    seconds: float
    loss_first: float
    loss_last: float
    held_out_loss_before: float | None = None
    held_out_loss_after: float | None = None
    peak_memory_bytes: int | None = None
    data_sha256: str
    template: str
    base: str
    device: str
    versions: dict[str, str]


class Launch(Frozen):
    """The process or Job that works on a run."""

    launcher: Literal["subprocess", "kubernetes"]
    name: str
    attempt: int
    """Counts launches of this run from 0."""


class TrainRun(Frozen):
    """The payload of a training job's one item."""

    kind: Literal["train"] = "train"
    version: Literal[1] = 1
    id: str = Field(pattern=r"^[0-9a-f]{32}$")
    tenant: str
    config: TrainConfig
    base: str
    """The model to start from: hub name, local directory, or `name@version` of the registry."""
    model: str
    """Name of the result in the registry."""
    data: str
    """Key of the training data in the blob store."""
    common_with: tuple[str, ...] = ()
    """Keys of other methods' data: only ids that survive in all of them are trained on."""
    launch: Launch | None = None
    progress: TrainProgress | None = None
    result: TrainResult | None = None
    meta: dict[str, JsonValue] = Field(default_factory=dict)
    """Where the data came from: job, method, budget."""

    @property
    def prefix(self) -> str:
        """Where in the blob store everything of the run lies, without a slash at its end."""
        return f"{self.tenant}/runs/{self.id}"

    def grown(self, **fields: object) -> Self:
        """A copy with these fields, checked."""
        own = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self).model_validate({**own, **fields})
