"""Which rows share a forward pass: as many as a budget of tokens holds; nothing is padded."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["plan_batches"]


def plan_batches(lengths: Sequence[int], max_batch_tokens: int) -> list[list[int]]:
    """Indices of the rows of each batch, longest rows first: a lack of memory shows at once.

    The tokens of a batch are at most `max_batch_tokens`; a row that is longer is a batch of one.
    Each row goes to the first batch with room. O(rows x batches).
    """
    batches: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        found = next((at for at, left in enumerate(room) if lengths[i] <= left), None)
        if found is None:
            batches.append([i])
            room.append(max_batch_tokens - lengths[i])
        else:
            batches[found].append(i)
            room[found] -= lengths[i]
    return batches
