"""Attention over packed rows: sequences of any lengths one behind the other, without padding.

Registered with transformers under a name of its own, so that its model code runs unchanged; it gets
the layout of the pack as the keyword `packing`. No mask is ever as large as the pack: on a GPU the
variable-length kernel takes the boundaries, elsewhere each row is one call. A row may continue a
sequence whose keys and values are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

__all__ = ["PACKED", "KeyValues", "PackedRow", "Packing", "packed_attention"]

PACKED = "asap_packed"
"""What transformers knows the attention by."""

_QUERIES = 512  # behind known keys they share one mask: 512 x 16,384 booleans are 8 MB
_OTHER_KINDS = ("softcap", "s_aux", "position_bias")


@dataclass(slots=True, eq=False)
class KeyValues:
    """Keys and values of one sequence, each (1, heads, tokens, width) for each layer."""

    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PackedRow:
    """One row of a pack."""

    tokens: int
    """How many new tokens it brings."""
    reused: int = 0
    """How many tokens of `known` stand before them."""
    known: KeyValues | None = None
    grown: KeyValues | None = None
    """Where keys and values of the whole row are put, if anywhere."""


class Packing:
    """The layout of one pack, as attention needs it.

    Args:
        rows: in their order; the pack is as long as their `tokens` together.
        device: where the pack runs.
    """

    def __init__(self, rows: Sequence[PackedRow], device: torch.device) -> None:
        self.rows = tuple(rows)
        self.sizes = [row.tokens for row in rows]
        self.whole = [row.reused + row.tokens for row in rows]
        """Tokens that the last one of each row sees."""
        self.plain = all(row.known is None and row.grown is None for row in rows)
        self.query_ends, self.key_ends = (
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
            for lengths in (self.sizes, self.whole)
        )
        for row in rows:
            if row.grown is not None:
                row.grown.layers.clear()  # of a pass that ran out of memory half-way

    def split(self, key: Tensor, value: Tensor, layer: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each row, known ones included. Keeps those that are to be kept."""
        parts = []
        for row, new_key, new_value in zip(
            self.rows,
            torch.split(key, self.sizes, 2),
            torch.split(value, self.sizes, 2),
            strict=True,
        ):
            keys, values = new_key, new_value
            if row.known is not None:
                old_key, old_value = row.known.layers[layer]
                keys = torch.cat([old_key[:, :, : row.reused], new_key], dim=2)
                values = torch.cat([old_value[:, :, : row.reused], new_value], dim=2)
            if row.grown is not None:
                if row.known is None:  # a view would hold the whole pack
                    keys, values = keys.clone(), values.clone()
                row.grown.layers.append((keys, values))
            parts.append((keys, values))
        return parts


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each row: (1, heads, tokens, width) to (1, tokens, heads, width).

    Raises TypeError for attention of another kind than the softmax of scaled products.
    """
    if any(options.get(name) is not None for name in _OTHER_KINDS):
        raise TypeError(f"packed attention has none of {', '.join(_OTHER_KINDS)}")
    if query.is_cuda and query.dtype != torch.float32:
        return _by_kernel(module, query, key, value, packing, scaling, sliding_window), None
    parts = packing.split(key, value, module.layer_idx)
    rows = [
        _one_row(row, keys, values, scaling, sliding_window).transpose(1, 2)
        for row, (keys, values) in zip(torch.split(query, packing.sizes, 2), parts, strict=True)
    ]
    return torch.cat(rows, dim=1), None


def _by_kernel(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """All rows in one call of the variable-length kernel, which aligns the last query of a row
    with its last key.
    """
    from torch.nn.attention.varlen import varlen_attn

    if not packing.plain:
        parts = packing.split(key, value, module.layer_idx)
        key = torch.cat([keys for keys, _ in parts], dim=2)
        value = torch.cat([values for _, values in parts], dim=2)
    query, key, value = (part.squeeze(0).transpose(0, 1) for part in (query, key, value))
    out = varlen_attn(
        query,
        key,
        value,
        packing.query_ends,
        packing.key_ends,
        max(packing.sizes),
        max(packing.whole),
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=True,
    )
    assert isinstance(out, Tensor)
    return out.unsqueeze(0)


def _one_row(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, sliding_window: int | None
) -> Tensor:
    """Causal attention of the last tokens of one sequence to the whole of it."""
    new, whole = query.shape[2], key.shape[2]
    if new == whole and (sliding_window is None or whole <= sliding_window):
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
    parts: list[Tensor] = []
    for start in range(0, new, _QUERIES):
        block = query[:, :, start : start + _QUERIES]
        first = whole - new + start  # its place in the sequence
        end = first + block.shape[2]
        begin = 0 if sliding_window is None else max(0, first - sliding_window + 1)
        mask = torch.ones(end - first, end - begin, dtype=torch.bool, device=query.device)
        mask = mask.tril(first - begin)
        if sliding_window is not None:
            mask = mask.triu(first - begin - sliding_window + 1)
        parts.append(
            scaled_dot_product_attention(
                block,
                key[:, :, begin:end],
                value[:, :, begin:end],
                attn_mask=mask,
                scale=scaling,
                enable_gqa=True,
            )
        )
    return torch.cat(parts, dim=2)


AttentionInterface.register(PACKED, packed_attention)
