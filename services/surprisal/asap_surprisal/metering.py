"""What the device did: tokens, steps, seconds and floating-point operations, as running totals."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from asap_surprisal.products import linear

__all__ = ["Meter", "PassCost", "ScorerTotals", "peak_rate"]

_PRODUCT = {"cpu": 2048, "cuda": 8192}
"""Rows of a square matrix product that fills the device."""


@dataclass(frozen=True, slots=True)
class PassCost:
    """Floating-point operations of a model: 2 for each weight that a token or position meets."""

    token_weights: int = 0
    """Weights of the matrices that all tokens meet."""
    attention: int = 0
    """Layers x heads x width: one query and one key meet so often, twice."""
    position_weights: int = 0
    """Weights that scored positions alone meet: those of the output head, and of the last layer
    where it runs at needed places."""

    @classmethod
    def of(cls, backbone: Any, head: Any, *, whole: bool) -> PassCost:
        """The cost of a transformers model with plain attention.

        Args:
            backbone: the model without its output layer.
            head: that layer.
            whole: whether the last layer runs at all tokens. Where it runs at the needed ones, its
                attention and what gives the others' keys and values are not counted.
        """
        config = backbone.config.get_text_config()
        width = getattr(config, "head_dim", None)
        heads, layers = config.num_attention_heads, config.num_hidden_layers
        in_few_places = 0 if whole else _matrices(backbone.layers[-1])
        embedding = backbone.get_input_embeddings().weight.numel()
        return cls(
            token_weights=_matrices(backbone) - embedding - in_few_places,
            attention=(layers - (not whole)) * heads * (width or config.hidden_size // heads),
            position_weights=head.weight.numel() + in_few_places,
        )

    def operations(self, *, whole: int, reused: int, positions: int) -> int:
        """Of a row of `whole` tokens, the first `reused` of which are not run again."""
        pairs = (whole * (whole + 1) - reused * (reused + 1)) // 2
        weights = self.token_weights * (whole - reused) + self.position_weights * positions
        return 2 * weights + 4 * self.attention * pairs


@dataclass(frozen=True, slots=True)
class ScorerTotals:
    """Running totals of one scorer; differences over time are rates."""

    passes: int = 0
    rows: int = 0
    tokens: int = 0
    """Run by the backbone."""
    tokens_reused: int = 0
    """Not run, because their keys and values were kept."""
    steps: int = 0
    busy_s: float = 0.0
    """Seconds in which the device worked."""
    operations: int = 0


class Meter:
    """Adds up, from several threads."""

    def __init__(self) -> None:
        self._lock, self._totals = threading.Lock(), ScorerTotals()

    @property
    def totals(self) -> ScorerTotals:
        """Everything so far."""
        return self._totals

    def add(self, **amounts: float) -> None:
        """Add to the totals of those names."""
        with self._lock:
            before = self._totals
            sums = {name: getattr(before, name) + amount for name, amount in amounts.items()}
            self._totals = replace(before, **sums)


def _matrices(part: Any) -> int:
    return sum(weights.numel() for weights in part.parameters() if weights.ndim == 2)


def peak_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of one large matrix product, measured now; under a second.

    What `ScorerTotals` says per busy second, over this, is the achieved share of the device.
    """
    size, best = _PRODUCT[device.type], float("inf")
    square = torch.randn(size, size, device=device).to(dtype)
    for _ in range(5):
        _wait(device)
        started = time.perf_counter()
        linear(square, square)
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
