from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from asap_runtime.turns import take_turns

stocks = st.dictionaries(st.text("abcdefgh", min_size=1, max_size=3), st.integers(0, 40))


def asked(stock):
    """`ask` over numbered rows, and what it was asked for."""
    calls = []

    def ask(tenant, count):
        calls.append((tenant, count))
        return [(tenant, n) for n in range(min(count, stock[tenant]))]

    return ask, calls


@given(stocks, st.integers(0, 100))
def test_as_many_rows_as_there_are_up_to_the_limit(stock, limit):
    ask, _ = asked(stock)
    rows = take_turns(list(stock), limit, ask)
    assert len(set(rows)) == len(rows)
    if limit >= len(stock):
        assert len(rows) == min(limit, sum(stock.values()))


@given(stocks, st.integers(0, 100))
def test_nobody_gets_a_row_more_before_others_got_theirs(stock, limit):
    ask, _ = asked(stock)
    rows = take_turns(list(stock), limit, ask)
    seen = Counter()
    for tenant, number in rows:
        assert number == seen[tenant]  # a tenant's own order
        seen[tenant] += 1
        others = [seen[name] for name in seen if stock[name] > seen[name]]
        assert all(seen[tenant] - other <= 1 for other in others)


@given(stocks, st.integers(1, 100))
def test_asks_for_few_rows(stock, limit):
    ask, calls = asked(stock)
    take_turns(list(stock), limit, ask)
    assert len({tenant for tenant, _ in calls}) <= limit
    last = dict(calls)
    assert sum(min(count, stock[tenant]) for tenant, count in last.items()) <= limit + len(last)


def test_with_more_tenants_than_rows_all_have_a_chance():
    stock = {f"t{n}": 5 for n in range(20)}
    ask, _ = asked(stock)
    served = {tenant for _ in range(300) for tenant, _ in take_turns(list(stock), 4, ask)}
    assert served == set(stock)


def test_what_small_tenants_leave_goes_to_a_big_one():
    ask, _ = asked({"big": 1000, "small": 2, "none": 0})
    rows = Counter(tenant for tenant, _ in take_turns(["big", "small", "none"], 90, ask))
    assert rows == {"big": 88, "small": 2}
