"""The gateway on a free port, in a thread of its own, with live serving and without any stage."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import uvicorn

from asap_cli.roles import AllSettings
from asap_gateway.app import create_app
from asap_gateway.live import upstreams
from asap_gateway.live.serving import Serving
from asap_gateway.live.settings import ServingSettings
from asap_gateway.service import Gateway
from asap_runtime.blobs import BlobStore
from asap_runtime.endpoints import EndpointRegistry
from asap_runtime.host import open_database
from asap_runtime.keys import KeyRing
from asap_runtime.logs import configure_logs
from asap_runtime.pepper import load_pepper
from asap_runtime.queue import MemoryQueue
from waiting import PATIENCE_S


@dataclass(frozen=True)
class LiveGateway:
    """Where it listens, and what tests steer."""

    url: str
    serving: Serving
    keys: KeyRing
    endpoints: EndpointRegistry


@contextmanager
def live_gateway(
    home: Path, *, keyed: bool = False, limits: dict[str, Any] | None = None, **serving: Any
) -> Iterator[LiveGateway]:
    """Serves with these settings of live serving while the block runs; a model server that is slow
    because the machine is busy is well.
    """
    settings = AllSettings(
        home=home, telemetry={"log_level": "error"}, gateway=limits or {"requests_per_s": 10_000}
    )
    configure_logs(settings.telemetry)
    database = open_database(settings)
    endpoints = EndpointRegistry(database)
    patient = {"health_period_s": 0.2, "connect_s": PATIENCE_S}
    live = Serving(ServingSettings(**patient | serving), endpoints)
    keys = KeyRing(database, load_pepper(settings.auth, home))
    gateway = Gateway(
        database, MemoryQueue(), settings.gateway, BlobStore.in_folder(home / "blobs")
    )
    app = create_app(gateway, keys=keys if keyed else None, serving=live)
    server = uvicorn.Server(
        uvicorn.Config(
            app, log_config=None, ws="none", timeout_graceful_shutdown=5, timeout_keep_alive=3600
        )
    )
    with (
        patch.object(upstreams, "HEALTH_TIMEOUT_S", PATIENCE_S),
        socket.create_server(("127.0.0.1", 0), backlog=2048) as listener,
    ):
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        until = time.monotonic() + PATIENCE_S
        while not server.started:
            if not thread.is_alive() or time.monotonic() > until:
                raise RuntimeError("the gateway does not start")
            time.sleep(0.02)
        try:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            yield LiveGateway(url, live, keys, endpoints)
        finally:
            server.should_exit = True
            thread.join(PATIENCE_S)
            database.close()
