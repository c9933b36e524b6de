"""The forward pass: hidden states of a pack, the output head on the needed rows alone, in float32.

Full logits of 16,384 tokens and a vocabulary of 152,064 are 4.6 GiB in bfloat16, and their
log-softmax as much again; the rows of 150 first tokens are 91 MB. bfloat16 log-probabilities would
also make ties: they have steps of 0.031 nats between 4 and 8, and logits of 0.125 above 16.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import Tensor

from asap_surprisal.attention import KeyValues, PackedRow, Packing, to_device
from asap_surprisal.memory import Budget
from asap_surprisal.metering import PassCost
from asap_surprisal.products import linear
from asap_surprisal.sequence import Row

__all__ = ["HEAD_ROWS", "CausalLM", "PassRow", "Pending", "float32_head", "launch"]

HEAD_ROWS = 256
"""Rows that the output head sees at once. 256 keep the matrix product efficient and its float32
buffers at 156 MB each for a vocabulary of 152,064."""

_HEAD_COLUMNS = (
    16384  # vocabulary entries that are widened to float32 at once: 235 MB at width 3,584
)


@dataclass(frozen=True, slots=True)
class CausalLM:
    """A language model in two parts, as the scorer uses it."""

    backbone: Callable[..., Any]
    """`input_ids`, int64 (1, tokens), to `last_hidden_state` (1, tokens, width), for a pack
    (1, needed, width)."""
    head: Callable[[Tensor], Tensor]
    """(positions, width) to logits (positions, vocabulary)."""
    device: torch.device
    dtype: torch.dtype = torch.float32
    max_positions: int | None = None
    """Longest input of the backbone; None when its config does not say."""
    packs: bool = False
    """Whether `backbone` takes `position_ids` and `packing`, so that rows can share a pass."""
    cost: PassCost = field(default_factory=PassCost)
    budget: Budget = field(default_factory=Budget)
    """What its device can hold at a time."""


@dataclass(frozen=True, slots=True)
class PassRow:
    """What one row of a pass computes."""

    row: Row
    """Its whole ids; `positions` are those behind the reused tokens."""
    reused: int = 0
    known: KeyValues | None = None
    grown: KeyValues | None = None

    @property
    def tokens(self) -> int:
        """Tokens that the backbone sees."""
        return len(self.row.ids) - self.reused

    @property
    def packed(self) -> PackedRow:
        """What attention knows of it."""
        needed = [position - self.reused for position in self.row.positions]
        return PackedRow(self.tokens, self.reused, self.known, self.grown, needed)


class Pending:
    """Values of one pass, which the device may still be working on.

    Args:
        values: (positions, 2), on the device.
        sizes: positions of each row.
        begin: makes `seconds`.
    """

    def __init__(self, values: Tensor, sizes: Sequence[int], begin: Any) -> None:
        self._sizes, self._begin = sizes, begin
        if values.is_cuda:
            self._values = torch.empty(values.shape, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._end: Any = _mark()
        else:
            self._values, self._end = values, time.perf_counter()

    def values(self) -> list[list[tuple[float, float]]]:
        """(surprisal, entropy) at each position of each row; waits for the device."""
        if not isinstance(self._end, float):
            self._end.synchronize()
        values = [(surprisal, entropy) for surprisal, entropy in self._values.tolist()]
        return [values[start:end] for start, end in pairwise(accumulate(self._sizes, initial=0))]

    @property
    def seconds(self) -> float:
        """Time of the device; known once `values` has returned."""
        if isinstance(self._end, float):
            return float(self._end - self._begin)
        return float(self._begin.elapsed_time(self._end)) / 1000


def float32_head(layer: Any) -> Callable[[Tensor], Tensor]:
    """The output layer computed in float32, whatever its type, with no wide copy of its weights."""
    if layer.weight.dtype == torch.float32:
        return cast(Callable[[Tensor], Tensor], layer)

    def logits(states: Tensor) -> Tensor:
        states = states.float()
        parts = [linear(states, part.float()) for part in torch.split(layer.weight, _HEAD_COLUMNS)]
        wide = torch.cat(parts, dim=1)
        return wide if layer.bias is None else wide + layer.bias.float()

    return logits


def surprisal_and_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """-ln p(target) and Shannon entropy of each row, in nats, float32 (§3.3, eq. 1).

    Args:
        logits: (positions, vocabulary), any float type.
        targets: int64 (positions,).
    """
    log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    surprisal = -log_p.gather(1, targets[:, None]).squeeze(1)
    # entr(0) = 0, where p * ln p of an excluded token (logit -inf) would be NaN
    return surprisal, torch.special.entr(log_p.exp_()).sum(-1)


@torch.inference_mode()
def launch(model: CausalLM, rows: Sequence[PassRow]) -> Pending:
    """Start one pass over the new tokens of `rows`; only one row for a model that does not pack.

    On a GPU it returns when the work is queued. Memory beyond the backbone's own is
    O(positions x width + HEAD_ROWS x vocabulary).
    """
    begin: Any = time.perf_counter()
    if model.device.type == "cuda":
        begin = _mark()
    ids, places, targets = to_device(
        [token for row in rows for token in row.row.ids[row.reused :]],
        [place for row in rows for place in range(row.reused, len(row.row.ids))],
        [target for row in rows for target in row.row.targets],
        dtype=torch.int64,
        device=model.device,
    )
    options: dict[str, Any] = {}
    if model.packs:
        options = {
            "position_ids": places[None],
            "packing": Packing([row.packed for row in rows], model.device),
        }
    hidden = model.backbone(input_ids=ids[None], use_cache=False, **options).last_hidden_state[0]
    if not model.packs:
        hidden = hidden[rows[0].row.positions]
    elif not len(targets):
        hidden = hidden[:0]  # a pass for its keys and values only, at all places
    blocks = [
        torch.stack(surprisal_and_entropy(model.head(states), block), dim=1)
        for states, block in zip(
            torch.split(hidden, HEAD_ROWS), torch.split(targets, HEAD_ROWS), strict=True
        )
    ]
    return Pending(torch.cat(blocks), [len(row.row.positions) for row in rows], begin)


def _mark() -> Any:
    """A point in the work of the GPU, with its time."""
    cuda: Any = torch.cuda  # its types are incomplete
    event = cuda.Event(enable_timing=True)
    event.record()
    return event
