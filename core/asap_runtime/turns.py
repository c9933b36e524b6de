"""Turns between tenants: one row each, round after round. Pure; knows no table and no query."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import chain, islice, zip_longest
from typing import TypeVar

__all__ = ["take_turns"]

R = TypeVar("R")


def take_turns(
    tenants: Sequence[str], limit: int, ask: Callable[[str, int], Sequence[R]]
) -> list[R]:
    """Up to `limit` rows of these tenants: the first of each, then the second of each, and so on.

    `ask(tenant, count)` gives the first rows of a tenant, `count` at most: an equal share, and
    again when others left something of theirs. Who begins is drawn: with more tenants than rows,
    all have the same chance.
    """
    hungry = random.sample(tenants, min(limit, len(tenants)))
    rows: dict[str, Sequence[R]] = dict.fromkeys(hungry, ())
    share, spare = 0, limit
    while hungry and spare > 0:
        share += -(-spare // len(hungry))
        for tenant in hungry:
            rows[tenant] = ask(tenant, share)
        hungry = [tenant for tenant in hungry if len(rows[tenant]) == share]
        spare = limit - sum(map(len, rows.values()))
    in_turn = zip_longest(*([(row,) for row in some] for some in rows.values()), fillvalue=())
    return list(islice(chain.from_iterable(chain.from_iterable(in_turn)), limit))
