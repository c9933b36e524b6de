"""Which model a worker generates with: a server that was given, or one that it starts itself, for
one model at a time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Protocol

import httpx

from asap.errors import AsapError, CapacityError, UpstreamUnavailable
from asap_evaluator.generate import Generator
from asap_evaluator.model_cache import ModelCache, ModelSource
from asap_evaluator.server import RETRY_S, VllmOptions, VllmServer
from asap_evaluator.settings import EvaluatorSettings, VllmSettings
from asap_evaluator.tokens import ModelTokens
from asap_runtime.logs import get_logger
from asap_runtime.model_files import locate_model

__all__ = ["GivenServing", "OwnServing", "Serving", "vllm_options"]

IDLE_S = 10.0
"""A model without requests for so long gives its place to another that is wanted: between two
batches of an item no request runs either.
"""
TURN_S = 1800.0
"""So long the items of one model go first; then those of another that wait get their turn."""
FORGET_S = 300.0
"""Nobody asked for another model for so long: nobody waits for a turn."""
FOLDERS = 64
"""Servers that one machine may have, each in a folder of its own."""
SERVED_NAME = "model"
"""Of a server of ours, which serves nothing else; names of models may be paths."""


class Serving(Protocol):
    """Where completions come from."""

    def use(self, model: ModelSource, /) -> AbstractAsyncContextManager[Generator]:
        """The model for the length of a block. Raises CapacityError (`not-ready`) when it cannot be
        had now, other errors when it cannot be had at all.
        """

    async def ready(self) -> None:
        """Raise CapacityError when items would only fail here."""

    async def close(self) -> None:
        """End what was started."""


class GivenServing:
    """A server that somebody else looks after."""

    def __init__(self, settings: EvaluatorSettings, cache: ModelCache) -> None:
        self._settings, self._cache = settings.evaluator, cache
        self._root = str(settings.evaluator.base_url).rstrip("/").removesuffix("/v1")
        self._connecting = asyncio.Lock()
        self._generators: dict[ModelSource, Generator] = {}

    @asynccontextmanager
    async def use(self, model: ModelSource, /) -> AsyncIterator[Generator]:
        """See `Serving.use`."""
        async with self._connecting:
            if model not in self._generators:
                self._generators[model] = await self._connected(model)
        yield self._generators[model]

    async def ready(self) -> None:
        """See `Serving.ready`."""
        try:
            async with httpx.AsyncClient(timeout=5.0) as client:
                answer = await client.get(f"{self._root}/health")
        except httpx.HTTPError:
            answer = None
        if answer is None or answer.status_code != httpx.codes.OK:
            raise CapacityError("the vLLM server does not answer", code="not-ready")

    async def close(self) -> None:
        """See `Serving.close`."""
        for generator in self._generators.values():
            await generator.close()

    async def _connected(self, model: ModelSource) -> Generator:
        settings, key = self._settings, self._settings.api_key
        if settings.tokenizer is None:
            directory = await asyncio.to_thread(self._cache.locate, model)
        else:
            directory = await asyncio.to_thread(locate_model, settings.tokenizer, weights=False)
        generator = Generator(
            lambda: self._root,
            settings.served_model or model.name,
            await asyncio.to_thread(ModelTokens.load, directory),
            api_key=None if key is None else key.get_secret_value(),
            concurrency=settings.concurrency,
            timeout_s=settings.request_timeout_s,
        )
        try:
            await generator.connect()
        except BaseException:
            await generator.close()
            raise
        return generator


class OwnServing:
    """A vLLM server of this worker. Items of the model that is served go first; another model gets
    its place when nothing has run for a while, or after half an hour.
    """

    def __init__(self, settings: EvaluatorSettings, cache: ModelCache) -> None:
        self._settings, self._cache = settings, cache
        self._model: ModelSource | None = None
        self._opening: asyncio.Task[Generator] | None = None
        self._server: VllmServer | None = None
        self._generator: Generator | None = None
        self._watching: asyncio.Task[None] | None = None
        self._users = 0
        self._used = self._failed = float("-inf")
        self._wanted: tuple[float, float] | None = None
        """When an item of another model was turned away, first and last."""
        self._log = get_logger()

    @asynccontextmanager
    async def use(self, model: ModelSource, /) -> AsyncIterator[Generator]:
        """See `Serving.use`. The first call for a model starts its server, which takes minutes."""
        opening = self._admitted(model)
        self._users += 1
        try:
            generator = await asyncio.shield(opening)  # others wait for it as well
            if self._server is None or not self._server.up:
                raise _busy("vLLM is being started anew")
            yield generator
        finally:
            self._users -= 1
            self._used = time.monotonic()

    async def ready(self) -> None:
        """See `Serving.ready`. Before the first item there is no server, and nothing is wrong."""
        if self._server is not None and not self._server.up:
            raise CapacityError("vLLM is not healthy", code="not-ready")

    async def close(self) -> None:
        """See `Serving.close`."""
        if self._opening is not None:
            self._opening.cancel()
            with suppress(asyncio.CancelledError, AsapError):
                await self._opening
        await self._shut()

    def _admitted(self, model: ModelSource) -> asyncio.Task[Generator]:
        """What opens, or has opened, the model. Raises CapacityError when it has to wait."""
        now = time.monotonic()
        if self._wanted is not None and now - self._wanted[1] > FORGET_S:
            self._wanted = None
        if model == self._model and self._opening is not None:
            if self._wanted is not None and now - self._wanted[0] > TURN_S:
                raise _busy("another model has its turn")
            if not self._broken() or now - self._failed < RETRY_S:
                return self._opening
        elif self._model is not None and not self._broken() and self._in_use(now):
            first = now if self._wanted is None else self._wanted[0]
            self._wanted = (first, now)
            raise _busy("another model is served")
        self._model, self._wanted = model, None
        self._opening = asyncio.create_task(self._open(model))
        return self._opening

    def _broken(self) -> bool:
        """Whether opening the model has failed, or its server died too often."""
        opening = self._opening
        failed = (
            opening is not None
            and opening.done()
            and (opening.cancelled() or opening.exception() is not None)
        )
        return failed or (self._watching is not None and self._watching.done())

    def _in_use(self, now: float) -> bool:
        opening = self._opening is not None and not self._opening.done()
        return opening or self._users > 0 or now - self._used < IDLE_S

    async def _open(self, model: ModelSource) -> Generator:
        try:
            await self._shut()
            directory = await asyncio.to_thread(self._cache.locate, model)
            tokens = await asyncio.to_thread(ModelTokens.load, directory)
            options = vllm_options(self._settings.evaluator.vllm, directory)
            self._server = server = await self._started(options)
            self._generator = generator = Generator(
                lambda: server.url,
                SERVED_NAME,
                tokens,
                concurrency=self._settings.evaluator.concurrency,
                timeout_s=self._settings.evaluator.request_timeout_s,
                facts={"dtype": self._settings.evaluator.vllm.dtype},
            )
            await generator.connect()
            self._watching = asyncio.create_task(self._watch(server))
        except BaseException as error:
            self._failed = time.monotonic()
            await self._shut()
            if isinstance(error, AsapError):
                self._log.warning("model.not_served", model=model.name, code=error.problem_code)
            raise
        return generator

    async def _started(self, options: VllmOptions) -> VllmServer:
        """A server that runs already, left by a worker before, or a new one in a free folder."""
        found: VllmServer | None = None
        work = self._settings.evaluator_dir
        for folder in sorted(work.glob("vllm-*")):
            left = VllmServer(options, folder)
            with suppress(CapacityError):  # another worker's, which lives
                if not await left.adopt() or found is not None:
                    await left.stop()
                else:
                    found = left
        if found is not None:
            return found
        for number in range(FOLDERS):
            server = VllmServer(options, work / f"vllm-{number}")
            with suppress(CapacityError):
                await server.start()
                return server
        raise _busy("too many servers run on this machine")

    async def _watch(self, server: VllmServer) -> None:
        try:
            await server.watch()
        except UpstreamUnavailable:
            self._failed = time.monotonic()
            self._log.error("server.given_up")

    async def _shut(self) -> None:
        """End the server that runs, if any."""
        watching, generator, server = self._watching, self._generator, self._server
        self._watching = self._generator = self._server = None
        if watching is not None:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
        if generator is not None:
            await generator.close()
        if server is not None:
            await server.stop()


def vllm_options(settings: VllmSettings, model: Path) -> VllmOptions:
    """A server for evaluations of the model in a directory (§4.1)."""
    on_cpu = settings.device == "cpu" or (settings.device == "auto" and _is_cpu_build())
    length = settings.max_model_len
    if on_cpu:  # compiling for a CPU takes minutes
        device: tuple[str, ...] = ("--enforce-eager",)
    else:
        device = ("--gpu-memory-utilization", str(settings.gpu_memory_utilization))
    space = {"VLLM_CPU_KVCACHE_SPACE": str(settings.cpu_kv_cache_gib)} if on_cpu else {}
    return VllmOptions(
        model=model,
        name=SERVED_NAME,
        args=(
            *("--dtype", settings.dtype, "--no-enable-prefix-caching"),
            # Sampling is the protocol's, and a model's own default would be a limit on budgets.
            *("--generation-config", "vllm"),
            *device,
            *(() if length is None else ("--max-model-len", str(length))),
            *settings.args,
        ),
        environment={"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", **space},
        program=() if settings.program is None else (settings.program,),
        start_s=settings.start_timeout_s,
    )


def _is_cpu_build() -> bool:
    with suppress(metadata.PackageNotFoundError):
        return "cpu" in metadata.version("vllm")
    return False


def _busy(detail: str) -> CapacityError:
    return CapacityError(detail, code="not-ready", retry_after_s=IDLE_S)
