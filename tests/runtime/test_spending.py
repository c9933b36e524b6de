from __future__ import annotations

import asyncio

import pytest

from asap_runtime.spending import Spending, charged_to, spend
from asap_runtime.values import micro_usd


@pytest.mark.parametrize(
    ("usd", "micro"),
    [(0.0, 0), (0.001, 1000), (0.1 + 0.2, 300_000), (1e-9, 1), (2.0000001, 2_000_001)],
)
def test_money_is_rounded_up_to_whole_millionths(usd, micro):
    assert micro_usd(usd) == micro


def test_what_is_taken_is_taken_once():
    spent = Spending()
    with charged_to(spent):
        spend(0.25)
        spend(0.5)
    spend(9.0)  # nobody adds up
    assert spent.take() == 750_000
    assert spent.take() == 0


async def test_concurrent_work_has_a_sum_of_its_own():
    async def work(spent, usd):
        with charged_to(spent):
            await asyncio.sleep(0)
            await asyncio.create_task(pay(usd))
            raise RuntimeError

    async def pay(usd):
        await asyncio.sleep(0)
        spend(usd)

    sums = [Spending() for _ in range(3)]
    done = await asyncio.gather(
        *(work(spent, usd) for usd, spent in enumerate(sums)), return_exceptions=True
    )
    assert [type(error) for error in done] == [RuntimeError] * 3
    assert [spent.take() for spent in sums] == [0, 1_000_000, 2_000_000]
