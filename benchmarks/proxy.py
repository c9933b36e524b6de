"""What the live proxy costs: time to the first token at 64 streams, and 1,000 streams at once.

A model server that only waits and sends, the gateway as `asap gateway` runs it, and this process
as the callers: three processes, so on two cores they also wait for each other.

python benchmarks/proxy.py [--streams N] [--rounds N] [--tokens-per-s N]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import httpx
from aiohttp import web
from report import show

FIRST_S = 0.05
"""The model server's own time to the first token."""
CALLERS, TOKENS = 64, 32
START_S = 60.0
BODY = {
    "model": "bench",
    "messages": [{"role": "user", "content": "question " * 100}],
    "stream": True,
}


async def model_server(port: int) -> None:
    """Sends what it is asked for at the speed it is asked for; its events are ready-made."""
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "bench"}

    def event(choices: list[dict], **more: object) -> bytes:
        return b"data: " + json.dumps({**head, "choices": choices, **more}).encode() + b"\n\n"

    def said(delta: dict, finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return event([choice])

    first, token = said({"role": "assistant", "content": ""}), said({"content": " token"})
    last = said({"content": "</think>"}, "stop")
    usage = event([], usage={"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101})

    async def answer(http: web.Request) -> web.StreamResponse:
        body = await http.json()
        tokens, gap_s = body["max_tokens"], body["seed"] / 1e6
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(http)
        await asyncio.sleep(FIRST_S)
        await response.write(first)
        for _ in range(tokens):
            await response.write(token)
            await asyncio.sleep(gap_s)
        await response.write(last)
        if body.get("stream_options"):
            await response.write(usage)
        await response.write(b"data: [DONE]\n\n")
        return response

    async def health(http: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    app.router.add_get("/health", health)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=4096).start()
    await asyncio.Event().wait()


@contextmanager
def process(command: list[str], url: str, **environment: str) -> Iterator[int]:
    """Runs until the block ends; its pid, once it is healthy."""
    running = subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            with suppress(httpx.HTTPError):
                if httpx.get(url, timeout=2).status_code == 200:
                    break
            time.sleep(0.1)
        else:
            raise RuntimeError(f"{command[2]} does not start")
        yield running.pid
    finally:
        running.terminate()
        running.wait(60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True, slots=True)
class Used:
    """Of a process: memory at its highest, processor time so far."""

    peak_mb: float
    memory_mb: float
    cpu_s: float

    @classmethod
    def of(cls, pid: int) -> Used:
        """As the kernel counts."""
        status = Path(f"/proc/{pid}/status").read_text()
        sizes = {
            line.split(":")[0]: line.split()[1] for line in status.splitlines() if "kB" in line
        }
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])
        return cls(
            int(sizes["VmHWM"]) / 1024,
            int(sizes["VmRSS"]) / 1024,
            ticks / os.sysconf("SC_CLK_TCK"),
        )


async def one(session: aiohttp.ClientSession, url: str, tokens: int, gap_s: float) -> float:
    """Seconds to the first token. Raises unless the stream comes whole."""
    body = BODY | {"max_tokens": tokens, "seed": round(gap_s * 1e6)}
    began, first, end = time.perf_counter(), 0.0, b""
    async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
        if answer.status != 200:
            raise RuntimeError(f"status {answer.status}")
        count = 0
        async for piece in answer.content.iter_any():
            first = first or time.perf_counter() - began
            count += piece.count(b'" token"')
            end = (end + piece)[-20:]
    if count != tokens or not end.endswith(b"[DONE]\n\n"):
        raise RuntimeError(f"{count} of {tokens} tokens")
    return first


async def first_tokens(urls: list[str], rounds: int) -> list[list[float]]:
    """Times to the first token by address, whose rounds take turns."""
    times: list[list[float]] = [[] for _ in urls]
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        for turn in range(rounds + 1):
            for url, found in zip(urls, times, strict=True):

                async def caller(
                    number: int, url: str = url, found: list[float] = found, turn: int = turn
                ) -> None:
                    await asyncio.sleep(number / CALLERS)  # all 64 run, and one begins at a time
                    first = await one(session, url, TOKENS, 0.05)
                    if turn:  # the first round opens connections
                        found.append(first)

                await asyncio.gather(*(caller(number) for number in range(CALLERS)))
    return times


async def many(url: str, streams: int, tokens_per_s: float) -> tuple[int, float]:
    """(errors, seconds) of so many streams at once."""
    errors, began = 0, time.perf_counter()
    timeout = aiohttp.ClientTimeout(total=600)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def caller(number: int) -> None:
            nonlocal errors
            await asyncio.sleep(number * 0.005)
            try:
                await one(session, url, round(20 * tokens_per_s), 1 / tokens_per_s)
            except (aiohttp.ClientError, RuntimeError, OSError):
                errors += 1

        await asyncio.gather(*(caller(number) for number in range(streams)))
    return errors, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens-per-s", type=float, default=4.0, help="of each of the streams")
    parser.add_argument("--serve", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(model_server(options.serve))
        return
    with tempfile.TemporaryDirectory() as home, ExitStack() as stack:
        upstream, gateway = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
        serve = [sys.executable, __file__, "--serve", upstream.rpartition(":")[2]]
        stack.enter_context(process(serve, f"{upstream}/health"))
        command = [sys.executable, "-m", "asap_cli.main", "gateway"]
        pid = stack.enter_context(
            process(
                [*command, "--port", gateway.rpartition(":")[2]],
                f"{gateway}/readyz",
                ASAP_HOME=home,
                ASAP_SERVING__ENDPOINTS=json.dumps({"bench": [upstream]}),
            )
        )
        direct, through = asyncio.run(first_tokens([upstream, gateway], options.rounds))
        before = Used.of(pid)
        errors, seconds = asyncio.run(many(gateway, options.streams, options.tokens_per_s))
        after = Used.of(pid)
    added = (f"{b - a:.2f}" for a, b in zip(_ms(direct), _ms(through), strict=True))
    show(
        f"Time to the first token, ms, {CALLERS} streams at once",
        ("", "median", "p95"),
        [
            ("direct", *_spread(direct)),
            ("through the gateway", *_spread(through)),
            ("added", *added),
        ],
    )
    events = options.streams * 20 * options.tokens_per_s
    print(
        f"{options.streams} streams at once, {options.tokens_per_s:g} tokens/s each: {errors} "
        f"errors in {seconds:.1f} s; gateway {before.memory_mb:.0f} MB before, "
        f"{after.peak_mb:.0f} MB at most, {after.cpu_s - before.cpu_s:.1f} s of CPU "
        f"({1e6 * (after.cpu_s - before.cpu_s) / events:.0f} us a token)"
    )


def _ms(seconds: list[float]) -> tuple[float, float]:
    ordered = sorted(seconds)
    return 1e3 * statistics.median(ordered), 1e3 * ordered[int(0.95 * len(ordered))]


def _spread(seconds: list[float]) -> tuple[str, str]:
    median, p95 = _ms(seconds)
    return f"{median:.2f}", f"{p95:.2f}"


if __name__ == "__main__":
    main()
