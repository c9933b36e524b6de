"""`asap serve`: gateway, stages, queue and database in one process, for a laptop or a single
machine.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import signal
from collections.abc import Sequence

import uvicorn
from prometheus_client import start_http_server
from rich.console import Console

from asap.errors import InvalidInput, Misconfigured
from asap_anchor.settings import AnchorSettings
from asap_anchor.stage import AnchorStage
from asap_gateway.app import create_app
from asap_gateway.service import Gateway
from asap_gateway.settings import GatewaySettings
from asap_runtime.host import StageHost, open_database
from asap_runtime.settings import load_settings, redacted
from asap_runtime.telemetry import configure_logs
from asap_surprisal.settings import SurprisalSettings
from asap_surprisal.stage import SurprisalStage


class EmbeddedSettings(AnchorSettings, SurprisalSettings, GatewaySettings):
    """The settings of all roles: in one process they are one."""


STAGES = {"anchor": AnchorStage, "surprisal": SurprisalStage}


def run_server(host: str | None, port: int | None, *, stages: Sequence[str]) -> None:
    """Serve the API until interrupted, with these stages in the same process."""
    settings = load_settings(EmbeddedSettings)
    host, port = host or settings.gateway.host, port or settings.gateway.port
    if not is_loopback(host):
        raise Misconfigured(
            f"{host} is reachable from other machines, and this server has no API keys; "
            "listen on 127.0.0.1"
        )
    configure_logs(settings.telemetry)
    database = open_database(settings)
    stage_host = StageHost.open(settings, database, [STAGES[name](settings) for name in stages])
    defaults = dict(settings.gateway.default_config)
    if settings.llm.model is None:
        defaults.setdefault("anchor", "extractive")
    gateway = Gateway(database, stage_host.queue, settings.gateway, defaults=defaults)
    app = create_app(gateway, running=lambda: stage_host)
    anchor = settings.llm.model or "extractive (not from the paper)"
    Console(stderr=True).print(
        f"asap serves http://{host}:{port} (scorer {settings.surprisal.model}, anchor {anchor}, "
        f"stages here: {', '.join(stages) or 'none'}, data in {settings.home})",
        highlight=False,
    )
    uvicorn.run(app, host=host, port=port, log_level="warning")
    database.close()


def run_worker(stage: str) -> None:
    """Work on one stage until SIGTERM: claims are given back, and the process leaves with code
    0.
    """
    if stage not in STAGES:
        raise InvalidInput(f"unknown stage {stage!r}; known: {', '.join(STAGES)}")
    settings = load_settings(EmbeddedSettings)
    configure_logs(settings.telemetry)
    if settings.telemetry.metrics_port is not None:
        start_http_server(settings.telemetry.metrics_port)
    database = open_database(settings)
    asyncio.run(_work(StageHost.open(settings, database, [STAGES[stage](settings)])))
    database.close()


async def _work(host: StageHost) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    async with host:
        await stopped.wait()


def effective_settings() -> str:
    """The settings of this machine as JSON, secrets as stars."""
    return json.dumps(redacted(load_settings(EmbeddedSettings)), indent=2)


def upgrade_database() -> None:
    """Bring the database of the settings to the newest schema."""
    open_database(load_settings(EmbeddedSettings)).close()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
