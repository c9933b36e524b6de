"""Matrix products on a CPU, by oneDNN.

torch gives float32 products to MKL, which leaves half of the vector width of some processors
unused: on an AMD EPYC of the fifth generation 230 GFLOP/s, where oneDNN reaches 540. torch offers
oneDNN's product to its compiler alone, so where a build lacks that name, `linear` is torch's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["linear", "use_onednn"]

_PRODUCT: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def linear(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`states` (…, inputs) times the transpose of `weight` (outputs, inputs), plus `bias`.

    What comes out has the type of `states` and differs from torch's own by rounding only.
    """
    if _PRODUCT is None or states.is_cuda or states.dtype != torch.float32:
        return nn.functional.linear(states, weight, bias)
    product: Tensor = _PRODUCT(states, weight, bias, "none", [], "")
    return product


class _OneDNNLinear(nn.Linear):
    """`nn.Linear` by way of `linear`; its weights are the same tensor."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def use_onednn(model: nn.Module) -> None:
    """Let every linear layer of a float32 model on a CPU compute by `linear`, in place."""
    for part in model.modules():
        if type(part) is nn.Linear and not part.weight.is_cuda:
            part.__class__ = _OneDNNLinear
