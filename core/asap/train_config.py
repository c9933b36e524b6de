"""What a training run is: the recipe and its presets. Travels with the run, never read from the
environment.

The defaults are the paper's (Appendix A: full fine-tuning, 10 epochs, 16,384 tokens, 16 samples a
step). What has no citation is ours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["PEAK_LEARNING_RATES", "TRAIN_PRESETS", "TemplateName", "TrainConfig"]

TemplateName = Literal["deepseek-r1", "chatml"]
Share = Annotated[float, Field(ge=0, lt=1)]

PEAK_LEARNING_RATES: dict[str, float] = {"qwen2": 4e-5, "qwen3": 4e-5, "llama": 2e-5}
"""By `model_type` of the base model's config (Appendix A: Qwen-7B 4e-5, Llama-8B 2e-5)."""


class TrainConfig(BaseModel):
    """Every knob of a training run."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )

    preset: Literal["paper", "demo"] = "paper"
    """`paper`: Appendix A. `demo`: a few hundred steps of a tiny model on a CPU."""
    backend: Literal["unsloth", "plain"] = "unsloth"
    """`unsloth`: one device (§3.4). `plain`: TRL alone, under torchrun with FSDP2 on several."""
    gpus: int = Field(1, ge=0, le=64)
    """Devices on each node; 0: the CPU."""
    nodes: int = Field(1, ge=1, le=64)

    # Data
    template: TemplateName | Literal["auto"] = "auto"
    """Chat form of the training string; `auto`: by the control tokens that the tokenizer knows."""
    max_seq_length: int = Field(16384, ge=16)
    """Longer samples are dropped and reported, never cut."""
    drop_empty_cot: bool = True
    loss_on: Literal["response", "all"] = "response"
    """`response`: eq. 3, on (C', A) and EOS alone. `all` reproduces the authors' scripts."""
    mask_forced_prefix: bool = True
    """No loss on the opening tag, which the serving prompt forces anyway."""
    held_out_share: Share = 0.0
    """Share of the samples that is not trained on; its loss is reported before and after."""
    packing: bool = False
    """Several samples in one row, none of which sees another."""

    # Optimisation
    epochs: float = Field(10, gt=0)
    max_steps: int | None = Field(None, ge=1)
    """Instead of `epochs`."""
    batch_size: int = Field(1, ge=1)
    """Samples (rows when packed) on one device in one pass."""
    accumulation: int = Field(16, ge=1)
    """Passes in one optimiser step."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak; default: that of the base model's family, 2e-5 for an unknown one."""
    min_lr_rate: Share = 0.1
    """Share of the peak at the end of the cosine."""
    warmup_ratio: Share = 0.03
    max_grad_norm: float = Field(0.2, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    seed: int = Field(42, ge=0, lt=2**32)
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    gradient_checkpointing: bool = True

    # What is kept
    log_every: int = Field(10, ge=1)
    """Steps between two lines of figures."""
    save_every: int | None = Field(None, ge=1)
    """Steps between two checkpoints; default: each epoch."""
    save_minutes: float = Field(15, gt=0)
    """A checkpoint is written at the latest after so long."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {**TRAIN_PRESETS.get(str(values.get("preset", "paper")), {}), **values}

    @model_validator(mode="after")
    def _one_device(self) -> Self:
        if self.backend == "unsloth" and (self.gpus > 1 or self.nodes > 1):
            raise ValueError("backend unsloth trains on one device; take plain for several")
        if self.nodes > 1 and self.gpus == 0:
            raise ValueError("several nodes need gpus of at least 1 on each")
        return self

    def peak_learning_rate(self, model_type: str) -> float:
        """The given peak, or that of the family, such as `qwen2`."""
        return self.learning_rate or PEAK_LEARNING_RATES.get(model_type, 2e-5)

    def hash(self) -> str:
        """SHA-256 over the canonical JSON of all values."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()


TRAIN_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "demo": {
        "gpus": 0,
        "max_seq_length": 2048,
        "held_out_share": 0.1,
        "max_steps": 200,
        "accumulation": 4,
        "learning_rate": 4e-5,
        "precision": "float32",
        "gradient_checkpointing": False,
        "save_every": 50,
    },
}
"""What each preset changes against the defaults above; explicit values win over the preset."""
