"""The embedded server on a free port, in a thread of its own: all is real, and the anchor stage
does as the test says.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from asap.errors import InvalidInput
from asap.types import Record
from asap_anchor.stage import AnchorStage
from asap_cli.roles import AllSettings
from asap_cli.serve import open_gateway
from asap_gateway.app import create_app
from asap_runtime.host import StageHost, open_database
from asap_runtime.keys import KeyRing
from asap_runtime.logs import configure_logs
from asap_runtime.pepper import load_pepper
from asap_runtime.queue import MemoryQueue
from asap_runtime.stage import Done, Stage
from asap_surprisal.stage import SurprisalStage
from waiting import PATIENCE_S


class SteeredAnchor(AnchorStage):
    """Waits while `open` is not set; refuses records while `refuses` is."""

    def __init__(self, settings: AllSettings) -> None:
        super().__init__(settings)
        self.open, self.refuses = threading.Event(), threading.Event()
        self.open.set()

    async def process(self, record: Record) -> Done:
        while not self.open.is_set():  # noqa: ASYNC110 - set from another thread
            await asyncio.sleep(0.01)
        if self.refuses.is_set():
            raise InvalidInput("refused by the \x1b[31mtest", code="scripted")
        return await super().process(record)


@dataclass(frozen=True)
class LiveServer:
    """Where it listens, the stage that tests steer, and the keys that callers need."""

    url: str
    anchor: SteeredAnchor
    keys: KeyRing


@contextmanager
def live_server(
    home: Path, *, keyed: bool = False, stages: Sequence[Stage[Any]] = ()
) -> Iterator[LiveServer]:
    """Serves with the demo scorer and no LLM while the block runs; `keyed`: to who has a key.

    `stages`: in the process besides the two of pruning.
    """
    settings = AllSettings(home=home, telemetry={"log_level": "error"})
    configure_logs(settings.telemetry)
    database = open_database(settings)
    anchor = SteeredAnchor(settings)
    host = StageHost(
        database, MemoryQueue(), [anchor, SurprisalStage(settings), *stages], sweep_period_s=0.05
    )
    keys = KeyRing(database, load_pepper(settings.auth, home))
    app = create_app(
        open_gateway(settings, host), keys=keys if keyed else None, running=lambda: host
    )
    server = uvicorn.Server(
        uvicorn.Config(
            app, log_config=None, ws="none", timeout_graceful_shutdown=1, timeout_keep_alive=3600
        )
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        until = time.monotonic() + PATIENCE_S
        while not server.started:
            if not thread.is_alive() or time.monotonic() > until:
                raise RuntimeError("the embedded server does not start")
            time.sleep(0.02)
        try:
            yield LiveServer(f"http://127.0.0.1:{listener.getsockname()[1]}", anchor, keys)
        finally:
            anchor.open.set()
            server.should_exit = True
            thread.join(PATIENCE_S)
            database.close()
