"""What one key may have at once under `/v1`, and how many tokens a minute; in the memory of this
process.

Without keys nobody is limited.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from asap.errors import Overloaded
from asap_gateway.auth import LOCAL, Principal

__all__ = ["KeyLimits"]

MINUTE_S = 60.0
MAX_KEYS = 10_000


@dataclass(slots=True)
class _Account:
    """Tokens that a key may still have; below zero after a long answer."""

    tokens: float
    at: float


class KeyLimits:
    """Streams and tokens of each key.

    How many tokens an answer has is known when it is over, so a key goes into debt, and waits.

    Args:
        streams: requests of a key at once.
        tokens_per_minute: lastingly, and as many at once.
        clock: seconds.
    """

    def __init__(
        self,
        *,
        streams: int,
        tokens_per_minute: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._streams, self._most, self._clock = streams, tokens_per_minute, clock
        self._open: Counter[str] = Counter()
        self._accounts: dict[str, _Account] = {}

    @contextmanager
    def admitted(self, caller: Principal) -> Iterator[None]:
        """A place for one request. Raises Overloaded (`rate-limited`)."""
        if caller == LOCAL:
            yield
            return
        key = caller.key_id
        if self._open[key] >= self._streams:
            raise Overloaded(
                f"a key may have {self._streams} requests at once",
                code="rate-limited",
                retry_after_s=1.0,
            )
        account = self._account(key)
        if account.tokens <= 0:
            raise Overloaded(
                f"a key may use {self._most} tokens a minute",
                code="rate-limited",
                retry_after_s=round((1 - account.tokens) * MINUTE_S / self._most, 3),
            )
        self._open[key] += 1
        try:
            yield
        finally:
            self._open[key] -= 1
            if not self._open[key]:
                del self._open[key]

    def spend(self, caller: Principal, tokens: int) -> None:
        """Note what a request used."""
        if caller != LOCAL:
            self._account(caller.key_id).tokens -= tokens

    def _account(self, key: str) -> _Account:
        """The key's account, with what has come in since it was last looked at."""
        now = self._clock()
        account = self._accounts.setdefault(key, _Account(self._most, now))
        earned = (now - account.at) * self._most / MINUTE_S
        account.tokens, account.at = min(self._most, account.tokens + earned), now
        if len(self._accounts) > MAX_KEYS:  # the full ones say nothing that a new one would not
            late = now - MINUTE_S
            self._accounts = {
                name: one for name, one in self._accounts.items() if one.at > late or name == key
            }
        return account
