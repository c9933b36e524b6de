"""The forward pass: hidden states of a batch, the output head on the needed rows alone, in float32.

Full logits of 16,384 tokens and a vocabulary of 152,064 are 4.6 GiB in bfloat16, and their
log-softmax as much again; the rows of 150 first tokens are 91 MB. bfloat16 log-probabilities would
also make ties: they have steps of 0.031 nats between 4 and 8, and logits of 0.125 above 16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import Tensor

from asap_surprisal.sequence import Row

__all__ = ["HEAD_ROWS", "CausalLM", "float32_head", "score_rows", "surprisal_and_entropy"]

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
    """`input_ids`, int64 (rows, tokens), to `last_hidden_state` (rows, tokens, width)."""
    head: Callable[[Tensor], Tensor]
    """(positions, width) to logits (positions, vocabulary)."""
    device: torch.device
    max_positions: int | None = None
    """Longest input of the backbone; None when its config does not say."""


def float32_head(layer: Any) -> Callable[[Tensor], Tensor]:
    """The output layer computed in float32, whatever its type, with no wide copy of its weights."""
    if layer.weight.dtype == torch.float32:
        return cast(Callable[[Tensor], Tensor], layer)

    def logits(states: Tensor) -> Tensor:
        states = states.float()
        parts = [states @ part.float().T for part in torch.split(layer.weight, _HEAD_COLUMNS)]
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
def score_rows(model: CausalLM, rows: Sequence[Row]) -> list[list[tuple[float, float]]]:
    """(surprisal, entropy) at each position of each row, from one batch.

    Rows are padded on the right and no mask is passed: under causal attention nothing behind a
    position reaches it, and without a mask attention takes its fast kernel. Memory beyond the
    backbone's own is O(positions x width + HEAD_ROWS x vocabulary).
    """
    longest = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [0] * (longest - len(row.ids)) for row in rows])
    at_row = [i for i, row in enumerate(rows) for _ in row.positions]
    at_token = [position for row in rows for position in row.positions]
    output = model.backbone(input_ids=ids.to(model.device), use_cache=False)
    hidden = output.last_hidden_state[at_row, at_token]
    targets = torch.tensor([target for row in rows for target in row.targets]).to(model.device)
    blocks = [
        torch.stack(surprisal_and_entropy(model.head(states), block), dim=1)
        for states, block in zip(
            torch.split(hidden, HEAD_ROWS), torch.split(targets, HEAD_ROWS), strict=True
        )
    ]
    values = [(surprisal, entropy) for surprisal, entropy in torch.cat(blocks).tolist()]
    ends = accumulate((len(row.positions) for row in rows), initial=0)
    return [values[start:end] for start, end in pairwise(ends)]
