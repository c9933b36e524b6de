"""The removal engine that every selector shares (Algorithm 2, lines 5 to 9): lowest score first,
until the budget holds. Knows indices, scores and token counts; neither text nor models.

O(P log P) for P steps: one sort, then O(1) per removal, because the tokens of a kept set are a sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Selection", "remove_lowest", "token_budget"]


@dataclass(frozen=True, slots=True)
class Selection:
    """Which steps stay (increasing indices), which went in which order, and what is left in
    tokens.
    """

    kept: tuple[int, ...]
    removed: tuple[int, ...]
    tokens: int
    over_budget: bool


class _KeptTokens:
    """Tokens of the kept steps: n(step + blank line) for all but the last, n(step) for the last.

    Exact when the tokenizer cuts text at every step start, which byte-level BPE with a Qwen2 or
    Llama-3 pre-tokenizer does: a run of newlines never merges with the character behind it.
    """

    def __init__(self, tokens: Sequence[int], tokens_joined: Sequence[int]) -> None:
        self._alone, self._joined = tokens, tokens_joined
        self.kept = [True] * len(tokens)
        self.size = len(tokens)
        self._last = self.size - 1
        self._sum = sum(tokens_joined)

    @property
    def total(self) -> int:
        if self._last < 0:
            return 0
        return self._sum - self._joined[self._last] + self._alone[self._last]

    def remove(self, i: int) -> None:
        self.kept[i] = False
        self.size -= 1
        self._sum -= self._joined[i]
        while self._last >= 0 and not self.kept[self._last]:
            self._last -= 1  # only ever moves left: O(P) over all removals

    def put_back_if_fits(self, i: int, max_tokens: int) -> bool:
        last = self._last
        self.kept[i] = True
        self.size += 1
        self._sum += self._joined[i]
        self._last = max(last, i)
        if self.total <= max_tokens:
            return True
        self.kept[i] = False
        self.size -= 1
        self._sum -= self._joined[i]
        self._last = last
        return False


def token_budget(
    *, max_tokens: int | None, keep_ratio: float | None, original_tokens: int, bos: int = 0
) -> int:
    """The budget L in content tokens. The epsilon keeps 0.29 of 100 at 29, not 28."""
    if max_tokens is not None:
        return max_tokens - bos
    if keep_ratio is None:
        raise ValueError("max_tokens or keep_ratio is needed")
    return math.floor(keep_ratio * original_tokens + 1e-9)


def remove_lowest(
    scores: Sequence[float | None],
    tokens: Sequence[int],
    tokens_joined: Sequence[int],
    *,
    max_tokens: int | None = None,
    remove_steps: int | None = None,
    max_removals: int | None = None,
    min_steps: int = 1,
    protected: frozenset[int] = frozenset(),
    refill: bool = False,
) -> Selection:
    """Remove steps by ascending (score, index) until the target holds.

    Args:
        scores: importance per step, higher stays longer; None and NaN count as +inf.
        tokens: n(step) for each step.
        tokens_joined: n(step + blank line) for each step.
        max_tokens: stop as soon as the kept steps have at most so many tokens; may be 0 or less.
        remove_steps: instead of `max_tokens`, the number of steps to remove.
        max_removals: give up after so many removals (one round of iterative re-scoring).
        min_steps: never keep fewer steps than this.
        protected: indices that are never removed.
        refill: put removed steps back, highest score first, where they still fit `max_tokens`.
    """
    importance = [math.inf if s is None or math.isnan(s) else s for s in scores]
    kept = _KeptTokens(tokens, tokens_joined)
    removed: list[int] = []

    def satisfied() -> bool:
        if remove_steps is not None:
            return len(removed) >= remove_steps
        return max_tokens is None or kept.total <= max_tokens

    for i in sorted(
        range(len(importance)), key=importance.__getitem__
    ):  # stable: ties go earlier first
        if satisfied() or kept.size <= min_steps or len(removed) == max_removals:
            break
        if i not in protected:
            kept.remove(i)
            removed.append(i)
    over_budget = not satisfied()
    if refill and max_tokens is not None and not over_budget:
        back = [
            i
            for i in sorted(removed, key=lambda i: (-importance[i], i))
            if kept.put_back_if_fits(i, max_tokens)
        ]
        removed = [i for i in removed if i not in set(back)]
    return Selection(
        kept=tuple(i for i, is_kept in enumerate(kept.kept) if is_kept),
        removed=tuple(removed),
        tokens=kept.total,
        over_budget=over_budget,
    )
