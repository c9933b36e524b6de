"""Overlapping windows of steps for a reader with a small context (ours, not the paper's).

Stage 1 has no tokenizer: tokens are counted as a third of the UTF-8 bytes, which is more than most
tokenizers make of prose, code or Chinese.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["clip", "rough_tokens", "split_windows"]

_BYTES_PER_TOKEN = 3
_NUMBER_TOKENS = 6
"""The step's number and the blank line behind the step."""
_OVERLAP = 8
"""One part in so many of a window is shown again in the next one."""


def rough_tokens(text: str) -> int:
    """About the tokens of `text`, rather more than fewer."""
    return -(-len(text.encode()) // _BYTES_PER_TOKEN)


def split_windows(steps: Sequence[str], room: int | None) -> list[range]:
    """Indices of the steps of each window, in order; together they hold every step.

    A window holds at least one step, and otherwise at most `room` tokens. The steps at its end, up
    to an eighth of `room`, open the next one. Without `room` there is one window.
    """
    sizes = [rough_tokens(step) + _NUMBER_TOKENS for step in steps]
    if room is None or sum(sizes) <= room:
        return [range(len(steps))]
    windows: list[range] = []
    start = end = 0
    while end < len(steps):
        held = sum(sizes[start:end])
        while end < len(steps) and (end == start or held + sizes[end] <= room):
            held += sizes[end]
            end += 1
        windows.append(range(start, end))
        again = 0
        # Never back to the start, and room must be left for a step that is new.
        while end - again - 1 > start and _fits(sizes[end - again - 1 : end + 1], room):
            again += 1
        start = end - again
    return windows


def _fits(seen_and_new: Sequence[int], room: int) -> bool:
    *seen, new = seen_and_new if len(seen_and_new) > 1 else [*seen_and_new, 0]
    return _OVERLAP * sum(seen) <= room and sum(seen) + new <= room


def clip(text: str, room: int) -> str:
    """`text`, or when it is longer than `room` tokens its beginning and its end."""
    if rough_tokens(text) <= room:
        return text
    data = text.encode()
    half = max(0, (room - 2) * _BYTES_PER_TOKEN // 2)
    head, tail = data[:half], data[len(data) - half :]
    return f"{head.decode(errors='ignore')} … {tail.decode(errors='ignore')}"
