"""Requests per key: a token bucket for each, in the memory of this replica.

Behind n replicas a key may make n times as many requests. Without keys nobody is limited.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asap.errors import Overloaded
from asap_gateway.auth import LOCAL, principal
from asap_runtime.http_problems import answer
from asap_runtime.problems import describe

__all__ = ["RateLimit"]

MAX_BUCKETS = 10_000
"""The one used longest ago goes first; it was most likely full."""


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float


class RateLimit:
    """ASGI middleware; stands behind authentication, answers 429 `rate-limited`.

    Every answer to a key says in `RateLimit-*` headers how many requests it may make at once, how
    many are left, and in how many seconds all are back.

    Args:
        app: the application.
        rate_per_s: requests per second of a key, lastingly.
        burst: requests of a key at once.
        clock: seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        rate_per_s: float = 20.0,
        burst: int = 60,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app, self._rate_per_s, self._burst, self._clock = app, rate_per_s, burst, clock
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 429."""
        caller = principal(scope)
        if scope["type"] != "http" or caller == LOCAL:
            await self._app(scope, receive, send)
            return
        bucket = self._filled(caller.key_id)
        accepted = bucket.tokens >= 1
        if accepted:
            bucket.tokens -= 1
        told = self._headers(bucket.tokens)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(told)
            await send(message)

        if accepted:
            await self._app(scope, receive, with_headers)
            return
        wait_s = (1 - bucket.tokens) / self._rate_per_s
        error = Overloaded(
            f"a key may make {self._rate_per_s:g} requests a second, {self._burst} at once",
            code="rate-limited",
            retry_after_s=round(wait_s, 3),
        )
        await answer(scope["path"], describe(error))(scope, receive, with_headers)

    def _filled(self, key_id: str) -> _Bucket:
        """The key's bucket with what has come in since it was last looked at."""
        now = self._clock()
        bucket = self._buckets.setdefault(key_id, _Bucket(self._burst, now))
        bucket.tokens = min(self._burst, bucket.tokens + (now - bucket.at) * self._rate_per_s)
        bucket.at = now
        self._buckets.move_to_end(key_id)
        if len(self._buckets) > MAX_BUCKETS:
            self._buckets.popitem(last=False)
        return bucket

    def _headers(self, tokens: float) -> dict[str, str]:
        return {
            "RateLimit-Limit": str(self._burst),
            "RateLimit-Remaining": str(math.floor(tokens)),
            "RateLimit-Reset": str(math.ceil((self._burst - tokens) / self._rate_per_s)),
        }
