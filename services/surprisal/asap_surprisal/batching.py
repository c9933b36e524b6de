"""Which rows share a forward pass: similar lengths, under a budget of padded tokens."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["plan_batches"]


def plan_batches(lengths: Sequence[int], max_batch_tokens: int) -> list[list[int]]:
    """Indices of the rows of each batch, longest rows first: a lack of memory shows at once.

    In a batch, longest row x rows <= `max_batch_tokens`; a row that is longer is a batch of one.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= max_batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
