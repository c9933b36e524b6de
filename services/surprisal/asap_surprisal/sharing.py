"""The question once: CoTs of one question in a batch share the keys and values of their start."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace
from itertools import takewhile

from asap_surprisal.attention import KeyValues
from asap_surprisal.forward import PassRow
from asap_surprisal.sequence import Row

__all__ = ["share_beginnings"]

_PAYS_TOKENS, _PAYS_SHARE = 512, 0.1
"""What must be saved, of a group's tokens: the beginning takes a pass of its own, and rows behind
it are a little slower."""


def share_beginnings(
    rows: Sequence[PassRow], questions: Sequence[Hashable | None], *, most: int
) -> tuple[list[PassRow], list[PassRow]]:
    """What to run first, and the rows that go on behind it, in their order.

    Args:
        rows: none of them computed in part.
        questions: what rows that may begin alike have in common; None: such a row stands alone.
        most: tokens of beginnings, together, whose keys and values may be kept.

    O(tokens).
    """
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for at, question in enumerate(questions):
        if question is not None:
            groups[question].append(at)
    first, rest = [], list(rows)
    for group in groups.values():
        members = [rows[at].row for at in group]
        same = _same(members) if len(group) > 1 else 0
        tokens = sum(len(row.ids) for row in members)
        saved = same * (len(group) - 1)
        if same > most or saved < max(_PAYS_TOKENS, _PAYS_SHARE * tokens):
            continue
        most -= same
        begin = PassRow(Row(members[0].ids[:same], [], [], []), grown=KeyValues())
        first.append(begin)
        for at in group:
            rest[at] = replace(rows[at], reused=same, known=begin.grown)
    return first, rest


def _same(rows: Sequence[Row]) -> int:
    """How many tokens all rows begin with, up to the first position that is scored."""
    shortest = min(row.positions[0] if row.positions else 0 for row in rows)
    columns = zip(*(row.ids[:shortest] for row in rows), strict=True)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
