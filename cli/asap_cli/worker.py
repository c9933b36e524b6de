"""`asap worker STAGE`: one stage on the queue of the settings, probes and metrics beside it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from contextlib import AsyncExitStack

from starlette.routing import BaseRoute

from asap.errors import CapacityError, InvalidInput
from asap_cli.roles import STAGES, AllSettings, open_stage, score_route
from asap_runtime.health import serve_worker, worker_app
from asap_runtime.host import StageHost, open_database
from asap_runtime.logs import configure_logs
from asap_runtime.settings import TelemetrySettings, load_settings
from asap_runtime.telemetry import configure_traces
from asap_surprisal.stage import SurprisalStage

__all__ = ["run_worker"]


def run_worker(name: str) -> None:
    """Work on one stage until SIGTERM: claims are given back, and the process leaves with 0.

    Raises CapacityError (exit code 75) when the device finds no memory any more: claims are given
    back then, too, and whoever watches the process starts a new one.
    """
    if name not in STAGES:
        raise InvalidInput(f"unknown stage {name!r}; known: {', '.join(STAGES)}")
    settings = load_settings(AllSettings)
    configure_logs(settings.telemetry)
    end_traces = configure_traces(settings.telemetry, name)
    database = open_database(settings)
    stage = open_stage(name, settings, database)
    routes = [score_route(stage, settings)] if isinstance(stage, SurprisalStage) else []
    host = StageHost.open(settings, database, [stage])
    is_broken = asyncio.run(_work(host, routes, settings.telemetry))
    database.close()
    end_traces()
    if is_broken:
        raise CapacityError(
            "the device failed, or had too little memory, twice in a row for one text alone; its "
            "items are given back: start the process again, or use a smaller model"
        )


async def _work(host: StageHost, routes: Sequence[BaseRoute], settings: TelemetrySettings) -> bool:
    """Whether it ended because its device is of no more use."""
    stopped, broken = asyncio.Event(), asyncio.Event()

    def give_up() -> None:
        broken.set()
        stopped.set()

    for stage in host.stages:
        if isinstance(stage, SurprisalStage):
            stage.on_broken = give_up
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    async with AsyncExitStack() as stack:
        if settings.admin_port is not None:
            app = worker_app(host, routes)
            await stack.enter_async_context(
                serve_worker(app, settings.admin_host, settings.admin_port)
            )
        await stack.enter_async_context(host)
        await stopped.wait()
    return broken.is_set()
