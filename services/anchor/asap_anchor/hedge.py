"""A second request like the first one where that is slow: whichever answers first wins."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from asap.ports import ChatResult
from asap.types import Usage

__all__ = ["first_answer"]

Call = Coroutine[Any, Any, ChatResult]


async def first_answer(first: Call, second: Callable[[], Call], after_s: float) -> ChatResult:
    """The result of `first`, or of `second`, which starts when the first took `after_s` seconds.

    The other one is cancelled; what it has cost is in the usage when it had ended, too. A failure
    counts only when there is no result of either: then the first one's is raised.
    """
    calls = [asyncio.create_task(first)]
    try:
        await asyncio.wait(calls, timeout=after_s)
        if not calls[0].done():
            calls.append(asyncio.create_task(second()))
        pending = set(calls)
        while pending and not _answers(calls):
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
    answers = _answers(calls)
    if not answers:
        return await calls[0]
    return replace(answers[0], usage=sum((one.usage for one in answers), Usage()))


def _answers(calls: list[asyncio.Task[ChatResult]]) -> list[ChatResult]:
    """What the calls have answered so far."""
    ended = (call for call in calls if call.done() and not call.cancelled())
    return [call.result() for call in ended if call.exception() is None]
