"""The surprisal stage: the core's stage 2 with one scorer for all items in flight."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import AsyncExitStack

from asap.errors import CapacityError, UpstreamUnavailable
from asap.fine import fine_prune
from asap.types import Record
from asap_runtime.stage import Done, Wait
from asap_runtime.telemetry import COT_TOKENS
from asap_surprisal.batcher import BatchingScorer, BatchScorer
from asap_surprisal.device import WatchedScorer
from asap_surprisal.direct import DirectScorer
from asap_surprisal.figures import Figures
from asap_surprisal.settings import SurprisalSettings

__all__ = ["SurprisalStage"]

WAIT_S, SPREAD = 30.0, 0.2
"""Until a record asks again a server that is away; over this part of it more they come back."""


class SurprisalStage:
    """Many records wait, one device works."""

    name = "surprisal"

    def __init__(self, settings: SurprisalSettings) -> None:
        self._settings = settings.surprisal
        self._device: WatchedScorer | None = None
        self._scorer: BatchingScorer | DirectScorer | None = None
        self._leaving = AsyncExitStack()
        self.on_broken: Callable[[], None] = lambda: None
        """Called when the device has no memory left for anything; to be set before the start."""

    @property
    def concurrency(self) -> int:
        """Records at the same time."""
        return self._settings.concurrency

    @property
    def scorer(self) -> BatchingScorer | DirectScorer:
        """The started scorer, for direct use. Raises CapacityError (`not-ready`) without one."""
        if self._scorer is None:
            raise CapacityError("the model is not loaded", code="not-ready", retry_after_s=5.0)
        return self._scorer

    async def start(self) -> None:
        """Load the model; seconds for the demo scorer, minutes for 7B.

        With vllm: read the tokenizer and ask the server for its window. Raises Misconfigured or
        UpstreamError when that cannot work.
        """
        if self._settings.backend == "vllm":
            self._scorer = await self._connect()
        else:
            self._scorer = await self._load()

    async def _load(self) -> BatchingScorer:
        from asap_surprisal.scorer import TorchScorer

        settings = self._settings
        scorer = await asyncio.to_thread(
            TorchScorer.load,
            settings.model,
            device=settings.device,
            dtype=settings.precision,
            max_batch_tokens=settings.max_batch_tokens,
        )
        self._leaving.push_async_callback(asyncio.to_thread, scorer.close)
        figures = await asyncio.to_thread(Figures, scorer)
        batching = BatchingScorer(
            self._watch(scorer, sure_tokens=scorer.max_batch_tokens),
            max_batch_tokens=scorer.max_batch_tokens,
            max_text_tokens=scorer.max_text_tokens,
            after_batch=figures.update,
        )
        self._leaving.push_async_callback(batching.stop)
        batching.start()
        return batching

    async def _connect(self) -> DirectScorer:
        from asap_surprisal.remote import RemoteScorer

        settings = self._settings
        assert settings.base_url is not None, "the settings see to it"
        key = settings.api_key
        scorer = await RemoteScorer.connect(
            base_url=settings.base_url,
            model=settings.served_model or settings.model,
            tokenizer=settings.model,
            api_key=None if key is None else key.get_secret_value(),
            concurrency=settings.concurrency,
        )
        self._leaving.push_async_callback(scorer.close)
        direct = DirectScorer(self._watch(scorer), max_inside=2 * settings.concurrency)
        self._leaving.push_async_callback(direct.stop)
        return direct

    def _watch(self, scorer: BatchScorer, *, sure_tokens: int | None = None) -> WatchedScorer:
        self._device = WatchedScorer(scorer, sure_tokens=sure_tokens, on_broken=self.on_broken)
        self._leaving.push_async_callback(self._device.close)
        return self._device

    async def ready(self) -> None:
        """Raise CapacityError unless the device was seen to work in the last minute."""
        if self._device is None:
            raise CapacityError("the model is not loaded", code="not-ready")
        await self._device.check()

    async def process(self, record: Record) -> Done[Record] | Wait[Record]:
        """The record with its fine block. While a vLLM server is away or full it waits, which is
        no attempt: a server that loads its model needs minutes.
        """
        try:
            [pruned] = await fine_prune([record], self.scorer)
        except UpstreamUnavailable as error:
            if not error.context.get("waits"):
                raise
            return Wait(record, WAIT_S * random.uniform(1, 1 + SPREAD))
        if pruned.tokens is not None:
            for part in ("original", "coarse", "pruned"):
                COT_TOKENS.labels(part).observe(getattr(pruned.tokens, part))
        return Done(pruned)

    async def stop(self) -> None:
        """Let go of the device."""
        self._device = self._scorer = None
        await self._leaving.aclose()
