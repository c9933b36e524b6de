"""Shadow requests: after some live ones the baseline is asked the same, and nobody gets its answer.

It shows what a compressed model saves on the traffic that there is. Live requests go first: there
is a bound on shadows, and none is begun while the baseline's servers are busy.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from typing import Any

from asap.errors import AsapError, NotFound
from asap_gateway.live.calls import Caller
from asap_gateway.live.requests import Asked
from asap_gateway.live.settings import ServingSettings
from asap_gateway.live.upstreams import Upstreams
from asap_gateway.live.usage import Tally
from asap_runtime.telemetry import SHADOW_REQUESTS, SHADOW_SECONDS_SAVED, SHADOW_TOKENS_SAVED

__all__ = ["Shadow"]

BUSY_SHARE = 0.5
"""Of the requests that a baseline's server takes; from there on none are shadows."""
MAX_ANSWER_BYTES = 8 * 2**20


class Shadow:
    """Asks baselines.

    Args:
        settings: which models have one, and how often it is asked.
        upstreams: where the baselines are.
        caller: makes the calls.
        draw: a number from 0 to 1 for each live request.
    """

    def __init__(
        self,
        settings: ServingSettings,
        upstreams: Upstreams,
        caller: Caller,
        *,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._settings, self._upstreams, self._caller = settings, upstreams, caller
        self._draw = draw
        self._tasks: set[asyncio.Task[None]] = set()

    def follow(self, tenant: str, asked: Asked, tally: Tally, seconds: float) -> None:
        """A live request has ended well after so many seconds: ask its baseline, or not."""
        rule = self._settings.shadow.get(asked.model)
        if rule is None or self._draw() >= rule.share or not tally.completion:
            return
        if len(self._tasks) >= self._settings.shadow_concurrency:
            SHADOW_REQUESTS.labels(asked.model, "dropped").inc()
            return
        work = self._compare(tenant, rule.baseline, asked, tally.completion, seconds)
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """End what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _compare(
        self, tenant: str, baseline: str, asked: Asked, tokens: int, seconds: float
    ) -> None:
        loop = asyncio.get_running_loop()
        began, outcome = loop.time(), "failed"
        try:
            route = self._upstreams.find(tenant, baseline)
            if min(one.outstanding for one in route.backends) >= BUSY_SHARE * route.most:
                outcome = "dropped"
                return
            ends_at = began + self._settings.total_s
            body = _whole(asked)
            async with self._caller.call(route, asked.path, body, ends_at=ends_at) as call:
                answer = json.loads(await call.whole(MAX_ANSWER_BYTES))
            usual = Tally()
            usual.read(answer.get("usage"))
            if usual.completion:
                outcome = "compared"
                SHADOW_TOKENS_SAVED.labels(asked.model).inc(usual.completion - tokens)
                SHADOW_SECONDS_SAVED.labels(asked.model).inc(loop.time() - began - seconds)
        except (AsapError, NotFound, ValueError, AttributeError):
            pass  # counted below; the live request has had its answer
        finally:
            SHADOW_REQUESTS.labels(asked.model, outcome).inc()


def _whole(asked: Asked) -> dict[str, Any]:
    """The request's body, not as a stream."""
    left_out = ("stream", "stream_options")
    return {name: value for name, value in asked.body.items() if name not in left_out}
