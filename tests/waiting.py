"""Waiting for what another task, thread or process does; ports and ends of servers of tests."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import Callable
from pathlib import Path

from aiohttp import web

PATIENCE_S = 60.0
"""Long after anything that works has happened, on a busy machine too."""

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LEAST = 12_000
_given: set[int] = set()


async def until(claim: Callable[[], object]) -> None:
    """Wait until the claim is true; fail when it does not become so."""
    ends = time.monotonic() + PATIENCE_S
    while not claim():
        assert time.monotonic() < ends, "it did not come true in time"
        await asyncio.sleep(0.01)


async def stop_serving(runner: web.AppRunner) -> None:
    """Clean a runner up, with those connections that were accepted a moment ago.

    Those become known to the runner some turns of the loop later; it would leave them open.
    """
    for site in list(runner.sites):
        await site.stop()
    for _ in range(5):
        await asyncio.sleep(0)
    await runner.cleanup()


def free_port() -> int:
    """A port of this machine that is free, and stays so until its server listens.

    It lies below those that the system gives away by itself: one of those may become the port of
    any connection meanwhile, even of a client that calls the server while that is down.
    """
    below = int(_RANGE.read_text().split()[0]) if _RANGE.exists() else 32_768
    for port in random.SystemRandom().sample(range(_LEAST, max(below, _LEAST + 4000)), 4000):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in _given:
            _given.add(port)
            return port
    raise RuntimeError("no port is free")
