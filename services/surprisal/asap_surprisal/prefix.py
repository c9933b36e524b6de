"""What stays on the device between the rounds of iterative pruning: keys, values and known scores.

Removing a step changes nothing before it, so a round runs the tokens behind the first change only.
An entry lives as long as its session; when the budget is full a new session goes without, so that
many sessions at once never push out one another.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from asap.ports import ScoreSession
from asap_surprisal.attention import KeyValues
from asap_surprisal.forward import PassRow
from asap_surprisal.preparation import Values
from asap_surprisal.sequence import Row

__all__ = ["PrefixStore", "Round"]


@dataclass(slots=True)
class Round:
    """One round of a session: what its pass runs, and what it need not."""

    work: PassRow
    known: Values
    """Values of the tokens that are not run again."""
    values: Values | None = None
    """Of all wanted tokens; None until the pass is done."""


class PrefixStore:
    """The rounds of all living sessions. Used by one thread, but for `Round.values`.

    Args:
        max_tokens: whose keys and values are kept at once; 0 keeps none.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._rounds: WeakKeyDictionary[ScoreSession, Round] = WeakKeyDictionary()

    @property
    def tokens(self) -> int:
        """Kept now."""
        return sum(len(kept.work.row.ids) for kept in list(self._rounds.values()))

    def begin(self, session: ScoreSession, row: Row) -> Round:
        """The next round, which scores `row`; it reuses what the last one left."""
        last = self._rounds.pop(session, None)
        grown = KeyValues() if self.tokens + len(row.ids) <= self.max_tokens else None
        if last is None or last.values is None:
            fresh = Round(PassRow(row, grown=grown), {})
        else:
            fresh = _continue(last, last.values, row, grown)
        if grown is not None:
            self._rounds[session] = fresh
        return fresh

    def clear(self) -> None:
        """Let go of everything, when memory is short."""
        self._rounds.clear()


def _continue(last: Round, values: Values, row: Row, grown: KeyValues | None) -> Round:
    old = last.work
    pairs = enumerate(zip(old.row.ids, row.ids, strict=False))
    shorter = min(len(old.row.ids), len(row.ids))
    same = next((at for at, (before, now) in pairs if before != now), shorter)
    # The distribution behind the last common token is that of another next token now: run it again.
    reused = max(0, same - 1)
    at = list(zip(row.positions, row.targets, row.tokens, strict=True))
    for position, _, token in at:
        if position < reused and token not in values:
            reused = position
    known = {token: values[token] for position, _, token in at if position < reused}
    behind = [entry for entry in at if entry[0] >= reused]
    rest = Row(
        ids=row.ids,
        positions=[position for position, _, _ in behind],
        targets=[target for _, target, _ in behind],
        tokens=[token for _, _, token in behind],
    )
    states = old.grown if reused else None
    return Round(PassRow(rest, reused, states, grown), known)
