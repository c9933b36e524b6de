"""Gestalt pattern matching (Algorithm 1): proof that a reply's steps stand in the source, in order.

The ratio of a pair is 2M / (|a| + |b|), M the characters in matching blocks, a the source step and
b the reply step; it is not symmetric. Verdicts are those of Python's `difflib`, reached faster:
cheap upper bounds of M refuse most pairs before the matching blocks (worst case cubic) are looked
for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from cydifflib import SequenceMatcher
from rapidfuzz.distance import LCSseq

from asap.types import MatchReport

__all__ = ["StepMatcher", "match_in_order"]


# Counting characters is linear, the bit-parallel subsequence |a||b|/64: up to about 2,000
# characters each the subsequence alone is the faster test (measured: half the time on real traces).
_LONG_PAIR = 4_000_000


class StepMatcher:
    """Compares many source steps with one reply step; difflib caches its second sequence, the
    reply's.
    """

    def __init__(self, reply: str, *, autojunk: bool = False) -> None:
        self._reply = reply
        self._counts = Counter(reply)
        self._autojunk = autojunk
        self._matcher: SequenceMatcher | None = None  # made when a pair passes all bounds

    def matched(self, source: str, tau: float) -> int | None:
        """M, the matched characters, when the ratio reaches `tau`; else None.

        Bounds of M, each exact, cheapest first: the shorter length; the characters both have; the
        longest common subsequence (Indel similarity), since matching blocks are a common
        subsequence.
        """
        reply, total = self._reply, len(source) + len(self._reply)
        if source == reply:
            return len(reply)
        bounds = [self._shorter, self._subsequence]
        if len(source) * len(reply) > _LONG_PAIR:
            bounds.insert(1, self._shared)
        for bound in bounds:
            if not _reaches(bound(source), total, tau):
                return None
        if self._matcher is None:
            self._matcher = SequenceMatcher(None, "", reply, self._autojunk)
        self._matcher.set_seq1(source)
        size = sum(block[2] for block in self._matcher.get_matching_blocks())
        return size if _reaches(size, total, tau) else None

    def _shorter(self, source: str) -> int:
        return min(len(source), len(self._reply))

    def _shared(self, source: str) -> int:
        return (self._counts & Counter(source)).total()

    def _subsequence(self, source: str) -> int:
        return int(LCSseq.similarity(source, self._reply))


def _reaches(matched: int, total: int, tau: float) -> bool:
    # difflib's own expression, so that a ratio that equals tau rounds the same way
    return (2.0 * matched / total if total else 1.0) >= tau


def match_in_order(
    source_steps: Sequence[str],
    reply_steps: Sequence[str],
    *,
    tau: float,
    autojunk: bool = False,
    containment: float = 0.0,
) -> MatchReport:
    """Algorithm 1: each reply step takes the first source step behind the previous one that is
    similar.

    Greedy earliest matching is complete: if any order-preserving assignment exists, it finds one.
    At most |source| comparisons. `containment` is the least M / |reply step|, which bounds invented
    text (ours). Steps are compared without surrounding white space.
    """
    if not reply_steps:
        return MatchReport(match="paper", valid=False, reason="the reply has no step")
    kept: list[int] = []
    similarities, containments = [], []
    at = 0
    for number, raw in enumerate(reply_steps, start=1):
        reply = raw.strip()
        matcher = StepMatcher(reply, autojunk=autojunk)
        while at < len(source_steps):
            source = source_steps[at].strip()
            at += 1
            matched = matcher.matched(source, tau)
            if matched is not None and matched >= containment * len(reply):
                kept.append(at - 1)
                total = len(source) + len(reply)
                similarities.append(2.0 * matched / total if total else 1.0)
                containments.append(matched / len(reply) if reply else 1.0)
                break
        else:
            return MatchReport(
                match="paper",
                valid=False,
                reason=f"step {number} of {len(reply_steps)} matches no later step of the source",
                kept=tuple(kept),
            )
    return MatchReport(
        match="paper",
        valid=True,
        kept=tuple(kept),
        similarity=min(similarities),
        containment=min(containments),
    )
