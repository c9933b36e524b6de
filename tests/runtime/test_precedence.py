from __future__ import annotations

import asyncio

from asap_runtime import precedence
from asap_runtime.precedence import Precedence
from waiting import PATIENCE_S


async def test_batch_work_waits_while_somebody_waits_for_an_answer(monkeypatch):
    monkeypatch.setattr(precedence, "PATIENCE_S", 3600)
    shared, done = Precedence(), []

    async def batch():
        await shared.give_way()
        done.append("batch")

    with shared.live():
        with shared.live():
            waiting = asyncio.create_task(batch())
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)
        assert done == []
        done.append("live")
    await waiting
    assert done == ["live", "batch"]


async def test_without_live_work_nobody_waits():
    async with asyncio.timeout(PATIENCE_S):
        await Precedence().give_way()


async def test_live_work_without_a_pause_slows_a_batch_and_does_not_stop_it(monkeypatch):
    monkeypatch.setattr(precedence, "PATIENCE_S", 0.01)
    shared = Precedence()
    with shared.live():
        async with asyncio.timeout(PATIENCE_S):
            await shared.give_way()


async def test_live_work_that_fails_lets_the_others_go_on(monkeypatch):
    monkeypatch.setattr(precedence, "PATIENCE_S", 3600)
    shared = Precedence()
    try:
        with shared.live():
            raise ValueError
    except ValueError:
        pass
    async with asyncio.timeout(PATIENCE_S):
        await shared.give_way()
