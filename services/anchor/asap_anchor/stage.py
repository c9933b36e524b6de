"""The anchor stage: the core's stage 1 with an LLM client, for one record at a time."""

from __future__ import annotations

from asap.coarse import coarse_prune
from asap.errors import CoarseExhausted
from asap.types import Record
from asap_anchor.cache import ReplyCache
from asap_anchor.chat import OpenAIChat
from asap_anchor.settings import AnchorSettings
from asap_runtime.stage import Done

__all__ = ["AnchorStage"]


class AnchorStage:
    """Hundreds of calls in flight in one process: each waits on the network, none on a thread."""

    name = "anchor"

    def __init__(self, settings: AnchorSettings) -> None:
        self._settings = settings
        self._chat: OpenAIChat | None = None

    @property
    def concurrency(self) -> int:
        """Records at the same time; each has one call in flight."""
        return self._settings.llm.concurrency

    async def start(self) -> None:
        """Make the client, when there is a server to ask."""
        llm = self._settings.llm
        if llm.model is not None:
            self._chat = OpenAIChat(
                base_url=llm.base_url,
                api_key=llm.api_key.get_secret_value(),
                model=llm.model,
                timeout_s=llm.timeout_s,
                concurrency=llm.concurrency,
                price_in=llm.price_in,
                price_out=llm.price_out,
                cache=ReplyCache(self._settings.home.expanduser() / "replies"),
            )

    async def process(self, record: Record) -> Done:
        """The record with its coarse block; a rejected record is the item's problem."""
        pruned = await coarse_prune(record, self._chat)
        if pruned.coarse is not None and pruned.coarse.status == "rejected":
            raise CoarseExhausted("no valid coarse CoT within max_attempts (on_fail=drop)")
        return Done(pruned)

    async def stop(self) -> None:
        """Close the connections."""
        if self._chat is not None:
            await self._chat.close()
