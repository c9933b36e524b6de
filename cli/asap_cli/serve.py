"""`asap serve` and `asap gateway`: the HTTP API, with all stages in the process or without."""

from __future__ import annotations

import ipaddress
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import uvicorn
from rich.console import Console

from asap.errors import Misconfigured
from asap.ports import TokenCounter
from asap_cli.roles import AllSettings, open_stage, score_route
from asap_gateway.app import create_app
from asap_gateway.live.serving import Serving
from asap_gateway.service import Gateway
from asap_gateway.submissions import ServerKnowledge
from asap_runtime.benchmarks import BenchmarkFolder
from asap_runtime.blobs import open_blobs
from asap_runtime.database import Database
from asap_runtime.deliverer import Deliverer
from asap_runtime.endpoints import EndpointRegistry
from asap_runtime.host import StageHost, open_database
from asap_runtime.keys import KeyRing
from asap_runtime.logs import configure_logs
from asap_runtime.pepper import load_pepper
from asap_runtime.retention import Retention
from asap_runtime.settings import load_settings
from asap_runtime.telemetry import configure_traces
from asap_surprisal.stage import SurprisalStage

__all__ = ["is_loopback", "open_gateway", "run_server"]

GRACE_S = 30
"""How long answers under way, downloads above all, may take once the process is asked to stop."""


def run_server(host: str | None, port: int | None, *, stages: Sequence[str]) -> None:
    """Serve the API until interrupted, with these stages in the same process."""
    settings = load_settings(AllSettings)
    host, port = host or settings.gateway.host, port or settings.gateway.port
    configure_logs(settings.telemetry)
    end_traces = configure_traces(settings.telemetry, "gateway")
    # A process that is the whole system brings the schema, too; one of several does not.
    with _database(settings, migrate=bool(stages)) as database:
        keys = _keys(settings, database, host)
        here = [open_stage(name, settings, database) for name in stages]
        deliverer = Deliverer(database, settings.webhooks)
        retention = Retention(database, open_blobs(settings), days=settings.gateway.retention_days)
        stage_host = StageHost.open(settings, database, here, [deliverer.run, retention.run])
        gateway = open_gateway(settings, stage_host)
        serving = Serving(settings.serving, EndpointRegistry(database))
        app = create_app(gateway, keys=keys, serving=serving, running=lambda: stage_host)
        for stage in here:
            if isinstance(stage, SurprisalStage):
                app.router.routes.append(score_route(stage, settings))
        _announce(settings, host, port, stages, keys)
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            log_config=None,  # the library's own would print texts of exceptions
            ws="none",
            timeout_graceful_shutdown=GRACE_S,
        )
        _Server(config, gateway.leave, serving.leave).run()
    end_traces()


def open_gateway(settings: AllSettings, host: StageHost) -> Gateway:
    """The gateway of these settings on the host's database and queue."""
    defaults = dict(settings.gateway.default_config)
    if settings.llm.model is None:
        defaults.setdefault("anchor", "extractive")
    knowledge = ServerKnowledge(
        defaults,
        settings.webhooks,
        settings.llm.planned_prices,
        _counter(settings, host),
        BenchmarkFolder(settings.benchmarks),
    )
    return Gateway(
        host.database,
        host.queue,
        settings.gateway,
        open_blobs(settings),
        knowledge,
        wake=host.wake,
        precedence=host.precedence,
    )


class _Server(uvicorn.Server):
    """Leaves with 0 when it is asked to stop, and says so at once: who waits is answered.

    The base class raises the signal again when it has stopped, and nothing is closed.
    """

    def __init__(self, config: uvicorn.Config, *on_exit: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_exit = on_exit

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        for leave in self._on_exit:
            leave()
        super().handle_exit(sig, frame)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _database(settings: AllSettings, *, migrate: bool) -> Iterator[Database]:
    database = open_database(settings, migrate=migrate)
    try:
        yield database
    finally:
        database.close()


def _keys(settings: AllSettings, database: Database, host: str) -> KeyRing | None:
    """The keys that callers need; None while there have never been any, on loopback alone."""
    ring = KeyRing(database, load_pepper(settings.auth, settings.home))
    if not is_loopback(host) and not ring.any_live():
        raise Misconfigured(
            f"{host} is reachable from other machines, and this server has no API keys; make one "
            "with `asap keys create`, or listen on 127.0.0.1"
        )
    return ring if ring.any_made() else None


def _counter(settings: AllSettings, host: StageHost) -> TokenCounter | None:
    """The scorer's tokenizer where the scorer runs here; elsewhere tokens are estimated roughly."""
    if not any(stage.name == "surprisal" for stage in host.stages):
        return None
    from asap_surprisal.tokenization import HFTokenCounter

    return HFTokenCounter.load(settings.surprisal.model)


def _announce(
    settings: AllSettings, host: str, port: int, stages: Sequence[str], keys: KeyRing | None
) -> None:
    anchor = settings.llm.model or "extractive (not from the paper)"
    callers = "API keys needed" if keys is not None else "no keys"
    Console(stderr=True).print(
        f"asap serves http://{host}:{port} (scorer {settings.surprisal.model}, anchor {anchor}, "
        f"stages here: {', '.join(stages) or 'none'}, {callers}, data in {settings.home})",
        highlight=False,
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
