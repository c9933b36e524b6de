"""What training costs a device: floating-point operations, and the rate that it could have."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["StepCost", "Work", "peak_memory_bytes", "peak_rate", "wait"]

_PRODUCT = {"cpu": 1024, "cuda": 8192}
"""Rows of a square matrix product that fills the device."""
_TRAINING = 3
"""Forward once, backward twice; what checkpointing repeats is not useful work."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """Floating-point operations of a model: 2 for each weight that a token meets."""

    token_weights: int
    """Weights of the backbone's matrices."""
    attention: int
    """Layers x heads x width: one query and one key meet so often, twice."""
    head_weights: int
    """Weights of the output head, which tokens with loss alone have to meet."""

    @classmethod
    def of(cls, model: Any) -> StepCost:
        """The cost of a transformers model with plain attention."""
        config = model.config.get_text_config()
        backbone = model.base_model
        matrices = sum(p.numel() for p in backbone.parameters() if p.ndim == 2)
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            token_weights=matrices - model.get_input_embeddings().weight.numel(),
            attention=config.num_hidden_layers * heads * width,
            head_weights=model.get_output_embeddings().weight.numel(),
        )

    def operations(self, *, tokens: int, loss_tokens: int, pairs: int) -> int:
        """Of training on so many tokens; `pairs` are those of a token and one it may look at."""
        weights = self.token_weights * tokens + self.head_weights * loss_tokens
        return _TRAINING * (2 * weights + 4 * self.attention * pairs)


class Work:
    """Adds up what batches hold, on their device: nothing waits for it before it is read."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None

    def add(self, batch: Mapping[str, torch.Tensor]) -> None:
        """Count a batch, padding left out."""
        import torch

        loss = (batch["labels"] != -100).sum()
        if (positions := batch.get("position_ids")) is not None:
            held = torch.stack([torch.full_like(loss, positions.numel()), loss, _pairs(positions)])
        else:
            lengths = batch["attention_mask"].sum(dim=1)
            held = torch.stack([lengths.sum(), loss, (lengths * (lengths + 1) // 2).sum()])
        self._sum = held if self._sum is None else self._sum + held

    def take(self) -> dict[str, int]:
        """tokens, loss_tokens and pairs since the last time."""
        counts = [0, 0, 0] if self._sum is None else self._sum.tolist()
        self._sum = None
        return dict(zip(("tokens", "loss_tokens", "pairs"), counts, strict=True))


def _pairs(positions: torch.Tensor) -> torch.Tensor:
    return (positions + 1).sum()


def peak_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of one large matrix product, measured now; under a second."""
    import torch

    size, best = _PRODUCT[device.type], float("inf")
    square = torch.randn(size, size, device=device).to(dtype)
    for _ in range(5):
        wait(device)
        started = time.perf_counter()
        square @ square
        wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process held: of the device's memory, on a CPU of the machine's."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
