"""The model servers behind `/v1`: which are there, which are well, and which one is next.

Models come from the settings, for callers of every tenant, and from the table of endpoints, for
those of the deploying tenant alone.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

import aiohttp

from asap.errors import AsapError, NotFound, Overloaded, UpstreamUnavailable
from asap_gateway.live.settings import ServingSettings
from asap_runtime.endpoints import Endpoint, EndpointRegistry
from asap_runtime.logs import get_logger
from asap_runtime.telemetry import BREAKER_OPEN

__all__ = ["Backend", "Route", "Upstreams"]

FAILURES = 3
"""In a row, after which a server is left alone."""
OPEN_S = 10.0
"""Then one request may try; while that is under way, for as long again, no other."""
HEALTH_TIMEOUT_S = 2.0
RETRY_AFTER_S = 2.0


@dataclass(slots=True, eq=False)
class Backend:
    """One server, as this process sees it."""

    url: str
    healthy: bool = True
    """Its last health check; taken for well before the first."""
    outstanding: int = 0
    failures: int = 0
    """In a row."""
    open_until: float = 0.0
    served: dict[str, int | None] = field(default_factory=dict)
    """Its own names of models, with the length of their context."""

    @property
    def address(self) -> str:
        """Host and port, for logs and metrics."""
        return self.url.partition("//")[2]

    def failed(self, now: float) -> None:
        """A request could not be begun, or fell silent."""
        self.failures += 1
        if self.failures >= FAILURES:
            self.open_until = now + OPEN_S
            BREAKER_OPEN.labels(self.address).set(1)

    def succeeded(self) -> None:
        """A request began as it should."""
        if self.failures >= FAILURES:
            BREAKER_OPEN.labels(self.address).set(0)
        self.failures = 0

    def is_open(self, now: float) -> bool:
        """Whether it is left alone."""
        return self.failures >= FAILURES and now < self.open_until


@dataclass(frozen=True, slots=True)
class Route:
    """A model and the servers that have it now; draining ones are not among them."""

    model: str
    backends: tuple[Backend, ...]
    version: int | None
    baseline_tokens: float | None
    opened: bool
    """Whether the model's prompt ends in `<think>`."""
    most: int
    """Requests of one server at once."""
    clock: Callable[[], float]

    @property
    def context(self) -> int | None:
        """Tokens of prompt and completion that every server takes, where that is known."""
        known = [size for one in self.backends if (size := one.served.get(self.name_at(one)))]
        return min(known, default=None)

    def name_at(self, backend: Backend) -> str:
        """What the server itself calls the model."""
        if self.model in backend.served or not backend.served:
            return self.model
        return next(iter(backend.served))

    def pick(self, tried: Collection[Backend], prefer: Backend | None = None) -> Backend:
        """The server with the fewest open requests among those that are well and not yet tried.

        Raises Overloaded when these are all full, UpstreamUnavailable when there are none.
        """
        now = self.clock()
        well = [
            one
            for one in self.backends
            if one not in tried and one.healthy and not one.is_open(now)
        ]
        if not well:
            raise UpstreamUnavailable(
                f"no server of the model {self.model!r} can be reached at the moment",
                retry_after_s=RETRY_AFTER_S,
            )
        if prefer in well:
            return prefer
        chosen = min(well, key=lambda one: one.outstanding)
        if chosen.outstanding >= self.most:
            raise Overloaded(
                f"all servers of the model {self.model!r} are busy; try again later",
                retry_after_s=RETRY_AFTER_S,
            )
        if chosen.failures >= FAILURES:
            chosen.open_until = now + OPEN_S
        return chosen


@dataclass(slots=True)
class _Served:
    """A model of one tenant (None: of all) while it is put together."""

    backends: list[Backend] = field(default_factory=list)
    version: int | None = None
    baseline_tokens: float | None = None


class Upstreams:
    """All routes; kept up to date while `watch` runs.

    Args:
        settings: static endpoints and limits.
        registry: what deployments announce; None: nothing but the settings.
        clock: seconds.
    """

    def __init__(
        self,
        settings: ServingSettings,
        registry: EndpointRegistry | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._registry, self._clock = settings, registry, clock
        self._backends: dict[str, Backend] = {}
        self._routes: dict[tuple[str | None, str], _Served] = {}
        self._arrange([])

    def find(self, tenant: str, model: str) -> Route:
        """The route of `name` or `name@version`. Raises NotFound."""
        served = self._routes.get((tenant, model)) or self._routes.get((None, model))
        if served is None:
            raise NotFound(f"there is no model {model[:80]!r} that is served", field="model")
        baselines, name = self._settings.baseline_tokens, model.partition("@")[0]
        return Route(
            model=model,
            backends=tuple(served.backends),
            version=served.version,
            baseline_tokens=baselines.get(model, baselines.get(name, served.baseline_tokens)),
            opened=not {model, name} & set(self._settings.unopened),
            most=self._settings.requests_per_endpoint,
            clock=self._clock,
        )

    def models(self, tenant: str) -> list[str]:
        """What the tenant may ask for, sorted."""
        return sorted({name for owner, name in self._routes if owner in (None, tenant)})

    async def watch(self, session: aiohttp.ClientSession) -> None:
        """Read the table and ask each server for its health, again and again."""
        while True:
            await self.refresh(session)
            await asyncio.sleep(self._settings.health_period_s)

    async def refresh(self, session: aiohttp.ClientSession) -> None:
        """One round of `watch`."""
        if self._registry is not None:
            try:
                self._arrange(await asyncio.to_thread(self._registry.live))
            except AsapError as error:  # what was served a moment ago still is
                get_logger().warning("endpoints.not_read", code=error.problem_code)
        await asyncio.gather(*(self._check(session, one) for one in self._backends.values()))

    def _arrange(self, announced: Iterable[Endpoint]) -> None:
        routes: defaultdict[tuple[str | None, str], _Served] = defaultdict(_Served)
        urls: set[str] = set()
        for name, static in self._settings.endpoints.items():
            routes[None, name].backends += [self._backend(url, urls) for url in static]
        for endpoint in announced:
            if endpoint.draining:
                continue
            backend = self._backend(endpoint.url, urls)
            names = [endpoint.model]
            if endpoint.version is not None:
                names.append(f"{endpoint.model}@{endpoint.version}")
            for name in names:
                served = routes[endpoint.tenant, name]
                served.backends.append(backend)
                served.version = endpoint.version
                served.baseline_tokens = endpoint.baseline_tokens
        self._routes = dict(routes)
        self._backends = {url: one for url, one in self._backends.items() if url in urls}

    def _backend(self, url: str, seen: set[str]) -> Backend:
        url = url.rstrip("/")
        seen.add(url)
        return self._backends.setdefault(url, Backend(url))

    async def _check(self, session: aiohttp.ClientSession, backend: Backend) -> None:
        before = backend.healthy
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                async with session.get(f"{backend.url}/health") as health:
                    backend.healthy = health.status == 200
                if backend.healthy and not backend.served:
                    backend.served = await _served(session, backend.url)
        except (TimeoutError, aiohttp.ClientError, OSError):
            backend.healthy = False
        if not backend.healthy:
            backend.served = {}  # what comes back may serve something else
        if before != backend.healthy:
            get_logger().info("endpoint.changed", address=backend.address, healthy=backend.healthy)


async def _served(session: aiohttp.ClientSession, url: str) -> dict[str, int | None]:
    """Names and context lengths of a server's models; nothing where it does not say."""
    async with session.get(f"{url}/v1/models") as answer:
        if answer.status != 200:
            return {}
        try:
            rows = (await answer.json(content_type=None))["data"]
            return {row["id"]: row.get("max_model_len") for row in rows}
        except (ValueError, LookupError, TypeError, AttributeError):
            return {}
