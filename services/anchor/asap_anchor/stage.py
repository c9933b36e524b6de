"""The anchor stage: the core's stage 1 with an LLM client, for one record at a time."""

from __future__ import annotations

import asyncio
import random
import time

from asap.coarse import coarse_prune
from asap.errors import CoarseExhausted, UpstreamTimeout, UpstreamUnavailable
from asap.types import Record
from asap_anchor.batches import BatchChat
from asap_anchor.cache import ReplyCache
from asap_anchor.chat import OpenAIChat
from asap_anchor.limits import Breaker
from asap_anchor.measure import measure, show_breaker
from asap_anchor.settings import AnchorSettings
from asap_anchor.transport import host_of
from asap_runtime.stage import Done, Wait
from asap_runtime.telemetry import COARSE_ATTEMPTS

__all__ = ["AnchorStage"]

WAIT_S = 30.0
"""Until an item asks again where the server named no time."""
PATIENCE_S = 60.0
"""What an item waits in memory for a slot or its turn; beyond it waits as a row, which is no
attempt and blocks nobody."""
LEAST_S = 1.0
"""A server that asks for no time at all is not asked in a tight loop."""
SPREAD = 0.2
"""Items that wait for one moment come back over this part of their wait more."""


class AnchorStage:
    """Hundreds of calls in flight in one process: each waits on the network, none on a thread."""

    name = "anchor"

    def __init__(self, settings: AnchorSettings) -> None:
        self._settings = settings
        self._chat: OpenAIChat | BatchChat | None = None
        self._breaker = Breaker(show_breaker(host_of(settings.llm.base_url)))

    @property
    def concurrency(self) -> int:
        """Records at the same time; each has one call in flight."""
        return self._settings.llm.concurrency

    async def start(self) -> None:
        """Make the client, when there is a server to ask."""
        llm, home = self._settings.llm, self._settings.home.expanduser()
        cache = ReplyCache(home / "replies")
        if llm.model is not None and llm.batch:
            self._chat = BatchChat(
                base_url=llm.base_url,
                api_key=llm.api_key.get_secret_value(),
                model=llm.model,
                cache=cache,
                folder=home / "batches",
                timeout_s=llm.timeout_s,
                period_s=llm.batch_period_s,
                prices=llm.prices,
            )
            await self._chat.start()
        elif llm.model is not None:
            self._chat = OpenAIChat(
                base_url=llm.base_url,
                api_key=llm.api_key.get_secret_value(),
                model=llm.model,
                timeout_s=llm.timeout_s,
                concurrency=llm.concurrency,
                requests_per_minute=llm.requests_per_minute,
                tokens_per_minute=llm.tokens_per_minute,
                hedge_after_s=llm.hedge_after_s,
                patience_s=PATIENCE_S,
                price_in=llm.price_in,
                price_out=llm.price_out,
                price_cached=llm.price_cached,
                cache=cache,
                measure=measure,
                breaker=self._breaker,
            )

    async def ready(self) -> None:
        """Raise UpstreamUnavailable while the LLM server is left alone."""
        if self._breaker.is_open:
            raise UpstreamUnavailable(
                f"The LLM server fails, and is asked again in a moment. {self._breaker.reason}",
                retry_after_s=self._breaker.wait_s(time.monotonic()),
            )

    async def process(self, record: Record) -> Done[Record] | Wait[Record]:
        """The record with its coarse block; a rejected record is the item's problem.

        While the server wants calls later the item waits, which is no attempt. What it was told so
        far is in the reply cache.
        """
        limit_s = self._settings.llm.item_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                pruned = await coarse_prune(record, self._chat)
        except UpstreamUnavailable as error:
            if not error.context.get("waits"):
                raise
            asked = error.context.get("retry_after_s")
            seconds = max(LEAST_S, asked) if isinstance(asked, float) else WAIT_S
            return Wait(record, seconds * random.uniform(1, 1 + SPREAD))
        except TimeoutError:
            raise UpstreamTimeout(f"stage 1 was not through in {limit_s:g} s") from None
        if pruned.coarse is not None:
            tries = [a for a in pruned.coarse.attempts if a.purpose == "coarse"]
            COARSE_ATTEMPTS.observe(len(tries))
        if pruned.coarse is not None and pruned.coarse.status == "rejected":
            raise CoarseExhausted("no valid coarse CoT within max_attempts (on_fail=drop)")
        return Done(pruned)

    async def stop(self) -> None:
        """Close the connections."""
        if self._chat is not None:
            await self._chat.close()
