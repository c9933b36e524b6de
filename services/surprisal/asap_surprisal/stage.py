"""The surprisal stage: the core's stage 2 with a scorer that batches over all items in flight."""

from __future__ import annotations

import asyncio

from asap.errors import Misconfigured
from asap.fine import fine_prune
from asap.types import Record
from asap_runtime.stage import Done
from asap_surprisal.batcher import BatchingScorer
from asap_surprisal.settings import SurprisalSettings

__all__ = ["SurprisalStage"]


class SurprisalStage:
    """Many records wait, one device works."""

    name = "surprisal"

    def __init__(self, settings: SurprisalSettings) -> None:
        self._settings = settings.surprisal
        self._scorer: BatchingScorer | None = None

    @property
    def concurrency(self) -> int:
        """Records at the same time."""
        return self._settings.concurrency

    @property
    def scorer(self) -> BatchingScorer:
        """The started scorer, for direct use."""
        if self._scorer is None:
            raise Misconfigured("the surprisal stage is not started")
        return self._scorer

    async def start(self) -> None:
        """Load the model; seconds for the demo scorer, minutes for 7B."""
        from asap_surprisal.scorer import TorchScorer

        settings = self._settings
        scorer = await asyncio.to_thread(
            TorchScorer.load,
            settings.model,
            device=settings.device,
            max_batch_tokens=settings.max_batch_tokens,
        )
        self._scorer = BatchingScorer(scorer, max_batch_tokens=settings.max_batch_tokens)
        self._scorer.start()

    async def process(self, record: Record) -> Done:
        """The record with its fine block."""
        [pruned] = await fine_prune([record], self.scorer)
        return Done(pruned)

    async def stop(self) -> None:
        """Let go of the device."""
        if self._scorer is not None:
            await self._scorer.stop()
