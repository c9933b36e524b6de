"""Weights of one byte: float8 with a scale for each output, widened again where they are used.

Weights only: activations keep their type, so this runs on every device, also where float8 cannot be
multiplied. Memory of the layers is halved against bfloat16; each pass pays for widening each matrix
once, which a batch of many tokens hides. Embeddings and the output head stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

__all__ = ["Fp8Linear", "to_fp8"]

_TYPE = torch.float8_e4m3fn
_LARGEST = torch.finfo(_TYPE).max


class Fp8Linear(nn.Module):
    """A linear layer whose weights take one byte: (…, inputs) to (…, outputs).

    Args:
        layer: what it stands for; its bias is shared.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach()
        # Rounded before it divides, so that it is the very number that multiplies later. A row of
        # zeros has no scale of its own, and any does.
        scale = (weight.abs().amax(dim=1) / _LARGEST).clamp(min=1e-12)
        narrow = (weight.float() / scale.float()[:, None]).clamp(-_LARGEST, _LARGEST).to(_TYPE)
        self.weight = nn.Parameter(narrow, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = layer.bias

    def forward(self, states: Tensor) -> Tensor:
        """The layer's outputs. Every float8 is a bfloat16 as well: nothing is lost on the way."""
        outputs = linear(states, self.weight.to(states.dtype)) * self.scale
        return outputs if self.bias is None else outputs + self.bias


@torch.no_grad()
def to_fp8(backbone: Any) -> None:
    """Replace every linear layer of the backbone, in place."""
    layers = [(name, part) for name, part in backbone.named_modules() if type(part) is nn.Linear]
    for name, layer in layers:
        backbone.set_submodule(name, Fp8Linear(layer))
