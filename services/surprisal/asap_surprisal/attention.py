"""Attention over packed rows: sequences of any lengths one behind the other, without padding.

Registered with transformers under a name of its own, so that its model code runs unchanged; it gets
the layout of the pack as the keyword `packing`. No mask is ever as large as the pack: on a GPU the
variable-length kernel takes the boundaries, elsewhere each row is one call. A row may continue a
sequence whose keys and values are known. `packing` may be a `LastLayer` instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

__all__ = [
    "PACKED", "Attended", "KeyValues", "LastLayer", "PackedRow", "Packing", "packed_attention",
    "to_device",
]  # fmt: skip

PACKED = "asap_packed"
"""What transformers knows the attention by."""

_QUERIES = 512  # so many share one mask: 512 x 16,384 booleans are 8 MB
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
    needed: Sequence[int] = ()
    """Its new tokens, counted from 0 and increasing, whose last hidden state is read."""


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
        starts = [0, *accumulate(self.sizes)]
        self.query_ends, self.key_ends, self.needed = to_device(
            starts,
            [0, *accumulate(self.whole)],
            [start + at for start, row in zip(starts, rows, strict=False) for at in row.needed],
            dtype=torch.int32,
            device=device,
        )
        """Ends of the rows, 0 in front, and the places in the pack whose last state is read."""
        for row in rows:
            if row.grown is not None:
                row.grown.layers.clear()  # of a pass that ran out of memory half-way

    def split(self, key: Tensor, value: Tensor, layer: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of each row, known ones included. Keeps those that are to be kept.

        Made one by one: rows behind a known beginning are together far longer than their pack.
        """
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
            yield keys, values


def to_device(*lists: list[int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Each list as a tensor, by one copy that the host does not wait for."""
    flat = [number for numbers in lists for number in numbers]
    both = torch.tensor(flat, dtype=dtype, pin_memory=device.type == "cuda")
    return torch.split(both.to(device, non_blocking=True), [len(numbers) for numbers in lists])


class Attended(Exception):
    """Ends a call of the last layer whose attention is known."""


@dataclass(slots=True, eq=False)
class LastLayer:
    """The attention of a model's last layer, which is needed in few places.

    The layer is called twice: over the whole pack, which `Attended` ends, and at the needed places.
    """

    packing: Packing
    attention: Tensor | None = None
    """(1, needed, heads, width); the first call finds it, the second one takes it."""


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing | LastLayer,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each row: (1, heads, tokens, width) to (1, tokens, heads, width).

    Raises TypeError for attention of another kind than the softmax of scaled products.
    """
    if any(options.get(name) is not None for name in _OTHER_KINDS):
        raise TypeError(f"packed attention has none of {', '.join(_OTHER_KINDS)}")
    if isinstance(packing, Packing):
        return _attend(module, query, key, value, packing, scaling, sliding_window), None
    if packing.attention is None:
        packing.attention = _attend(
            module, query, key, value, packing.packing, scaling, sliding_window, in_few_places=True
        )
        raise Attended
    return packing.attention, None


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    scaling: float | None,
    sliding_window: int | None,
    *,
    in_few_places: bool = False,
) -> Tensor:
    """(1, heads, tokens, width) to (1, tokens, heads, width), or to (1, needed, heads, width)."""
    if query.is_cuda and query.dtype != torch.float32:
        found = _by_kernel(module, query, key, value, packing, scaling, sliding_window)
        return found[:, packing.needed] if in_few_places else found
    outputs = []
    for row, new, (keys, values) in zip(
        packing.rows,
        torch.split(query, packing.sizes, 2),
        packing.split(key, value, module.layer_idx),
        strict=True,
    ):
        if in_few_places:
            new = new[:, :, list(row.needed)]
        whole = keys.shape[2]
        if new.shape[2] == whole and (sliding_window is None or whole <= sliding_window):
            found = scaled_dot_product_attention(
                new, keys, values, is_causal=True, scale=scaling, enable_gqa=True
            )
        else:
            at = row.needed if in_few_places else range(row.tokens)
            places = [row.reused + place for place in at]
            found = _by_masks(new, keys, values, places, scaling, sliding_window)
        outputs.append(found.transpose(1, 2))
    return torch.cat(outputs, dim=1)


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
        parts = list(packing.split(key, value, module.layer_idx))
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


def _by_masks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    places: Sequence[int],
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Causal attention of the tokens at increasing `places` of one sequence to what they see."""
    parts: list[Tensor] = [query[:, :, :0]]
    for start in range(0, len(places), _QUERIES):
        block = places[start : start + _QUERIES]
        end, begin = block[-1] + 1, 0
        if sliding_window is not None:
            begin = max(0, block[0] - sliding_window + 1)
        here = torch.tensor(block, device=query.device)[:, None]
        there = torch.arange(begin, end, device=query.device)
        mask = there <= here
        if sliding_window is not None:
            mask &= there > here - sliding_window
        parts.append(
            scaled_dot_product_attention(
                query[:, :, start : start + _QUERIES],
                key[:, :, begin:end],
                value[:, :, begin:end],
                attn_mask=mask,
                scale=scaling,
                enable_gqa=True,
            )
        )
    return torch.cat(parts, dim=2)


AttentionInterface.register(PACKED, packed_attention)
