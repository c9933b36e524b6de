"""Stage 1's speed and price: calls against the ideal, tokens and money of both protocols.

A server in a process of its own answers each call after 200 ms on average. With N slots the ideal
is N calls per 200 ms; asked by the HTTP library, by the chat client, and by the whole stage on
SQLite and the memory queue (claim, two calls and a proof per item, write). Then the recorded
replies, where they are at hand.

python benchmarks/anchor.py [SLOTS ...]
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from llm_server import llm_server
from report import best_of, data_folder, read_gzip, show, traces

from asap.coarse import coarse_prune
from asap.config import PruneConfig
from asap.estimate import Prices
from asap.ports import ChatResult, Sampling
from asap.proof import prove_reply
from asap.steps import split_steps
from asap.types import Record, Triple, Usage
from asap_anchor.chat import OpenAIChat
from asap_anchor.measure import measure
from asap_anchor.settings import AnchorSettings
from asap_anchor.stage import AnchorStage
from asap_runtime.host import StageHost, open_database
from asap_runtime.intake import JobIntake
from asap_runtime.ledger import JobLedger
from asap_runtime.logs import configure_logs
from asap_runtime.queue import BATCH, MemoryQueue
from asap_runtime.settings import TelemetrySettings
from asap_runtime.stage import Done, Wait
from asap_runtime.values import NewItem

SLOTS = (50, 64, 200, 500)
LATENCY_S = 0.2
ROUNDS = 60
"""Calls of each slot: the ends of a run, where slots stand idle, weigh little."""
PROMPT = "word " * 2000
CHARACTERS_PER_TOKEN = 3.5
PRICES = Prices(0.27, 1.10, price_cached=0.07)
"""US dollars per million tokens: what a large open model costs at its maker."""


@dataclass(frozen=True)
class Measured:
    """One run: calls, wall and processor seconds of this process."""

    calls: int
    wall_s: float
    cpu_s: float

    def row(self, name: str, slots: int) -> tuple[object, ...]:
        """A row of the table."""
        ideal_s = self.calls / slots * LATENCY_S
        return (
            name,
            slots,
            f"{self.calls / self.wall_s:,.0f}",
            f"{slots / LATENCY_S:,.0f}",
            f"{ideal_s / self.wall_s:.1%}",
            f"{1000 * self.cpu_s / self.calls:.2f}",
            f"{self.cpu_s / self.wall_s:.0%}",
        )


async def timed(slots: int, call: Callable[[], Awaitable[object]]) -> Measured:
    """`ROUNDS` calls one after the other in each slot, once the connections are there."""
    waiting = iter(range(slots * ROUNDS))

    async def slot() -> None:
        for _ in waiting:
            await call()

    await asyncio.gather(*(call() for _ in range(slots)))
    wall, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(slot() for _ in range(slots)))
    return Measured(slots * ROUNDS, time.perf_counter() - wall, time.process_time() - cpu)


async def http_library(base_url: str, slots: int) -> Measured:
    """What this machine and the server can do at this moment."""
    body = {"messages": [{"role": "user", "content": PROMPT}]}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def call() -> None:
            async with session.post(f"{base_url}/chat/completions", json=body) as response:
                await response.read()

        return await timed(slots, call)


async def chat_client(base_url: str, slots: int) -> Measured:
    """With limits and metrics, without a cache."""
    sampling = Sampling(temperature=2.0, max_tokens=100, seed=1)
    chat = OpenAIChat(
        base_url=base_url, api_key="none", model="x", concurrency=slots, measure=measure
    )
    measured = await timed(slots, lambda: chat.complete(PROMPT, sampling))
    await chat.close()
    return measured


class ClockedStage(AnchorStage):
    """The stage, and when its first item came and its last one went."""

    first_s, last_s = float("inf"), 0.0

    async def process(self, record: Record) -> Done | Wait:
        """As it is."""
        self.first_s = min(self.first_s, time.perf_counter())
        try:
            return await super().process(record)
        finally:
            self.last_s = time.perf_counter()


async def whole_stage(base_url: str, slots: int, batch_slots: float) -> Measured:
    """A job through the anchor stage in a `StageHost`; its items are of the batch priority."""
    with tempfile.TemporaryDirectory() as folder:
        llm = {"base_url": base_url, "model": "x", "concurrency": int(slots / batch_slots)}
        settings = AnchorSettings(home=Path(folder), llm=llm)
        database = open_database(settings)
        intake, ledger = JobIntake(database), JobLedger(database)
        items = slots * ROUNDS // 2
        cot = "\n\n".join(f"step {i} of the thinking, in a few plain words" for i in range(60))
        config = PruneConfig(method="asap_stage1", min_keep=0.0)
        stage = ClockedStage(settings)
        host = StageHost(database, MemoryQueue(), [stage])
        async with host:
            job = intake.create_job("bench", "prune", {}, BATCH)
            triples = (
                Triple(question=f"q {i}", cot=f"{i} {cot}", answer="a") for i in range(items)
            )
            payloads = (Record(triple=t, config=config).model_dump_json().encode() for t in triples)
            intake.add_items(job, (NewItem(i, "anchor", p) for i, p in enumerate(payloads)))
            intake.mark_ingested(job)
            host.wake()
            cpu = time.process_time()
            while True:
                view = await asyncio.to_thread(ledger.job, "bench", job)
                assert view is not None
                if view.phase == "done":
                    break
                await asyncio.sleep(0.25)
            wall_s = stage.last_s - stage.first_s
            measured = Measured(2 * items, wall_s, time.process_time() - cpu)
        done = sum(result.status == "succeeded" for result in ledger.results("bench", job))
        assert done == items, f"{done} of {items} items"
        database.close()
    return measured


def speed(slots: list[int]) -> None:
    """Both ways of asking, against the ideal."""
    configure_logs(TelemetrySettings(log_level="error"))
    rows = []
    with llm_server(LATENCY_S) as base_url:
        for n in slots:
            rows.append(asyncio.run(http_library(base_url, n)).row("HTTP library", n))
            rows.append(asyncio.run(chat_client(base_url, n)).row("chat client", n))
            # A fifth of the stage's slots is kept for live items: so many are left for a job.
            rows.append(asyncio.run(whole_stage(base_url, n, 0.8)).row("whole stage", n))
    show(
        f"Calls of {1000 * LATENCY_S:.0f} ms against the ideal",
        ("asked by", "slots", "calls /s", "ideal /s", "of the ideal", "ms CPU a call", "CPU"),
        rows,
    )


class Recorded:
    """Plays the recorded direct CoT, then the recorded reply; tokens by length."""

    name = "recorded"

    def __init__(self, direct: str, reply: str) -> None:
        self._replies = [direct, reply]
        self.usage: list[Usage] = []

    async def complete(self, prompt: str, sampling: Sampling) -> ChatResult:
        """The next recorded reply."""
        text = self._replies.pop(0)
        sent, received = tokens(prompt), tokens(text)
        usage = Usage(calls=1, prompt_tokens=sent, completion_tokens=received)
        self.usage.append(usage)
        return ChatResult(text, "stop", usage)


def tokens(text: str) -> int:
    return round(len(text) / CHARACTERS_PER_TOKEN)


def price() -> None:
    """Reply tokens, money and the proof's time of 16 recorded replies per protocol."""
    folder = data_folder()
    if folder is None:
        print("no recorded replies: set ASAP_TEST_DATA")
        return
    sources = {trace["id"]: trace for trace in traces()}
    replies = [r for r in read_gzip(folder / "llm_replies.jsonl.gz") if r["id"] in sources]
    rows = []
    for protocol in ("rewrite", "select"):
        used, accepted, proof_s = Usage(), 0, 0.0
        for reply in replies:
            source = sources[reply["id"]]
            triple = Triple(**{name: source[name] for name in ("question", "cot", "answer")})
            record = Record(triple=triple, config=PruneConfig(protocol=protocol, max_attempts=1))
            chat = Recorded(reply["direct"], reply[protocol])
            seconds, pruned = clocked(record, chat)
            accepted += pruned.coarse.status == "accepted"
            used += chat.usage[1]
            proof_s += seconds
        count = len(replies)
        usd = PRICES.usd(used.prompt_tokens, used.completion_tokens)
        batched = PRICES.usd(used.prompt_tokens, used.completion_tokens, batch=True)
        rows.append(
            (
                protocol,
                f"{accepted} of {count}",
                f"{used.prompt_tokens / count:,.0f}",
                f"{used.completion_tokens / count:,.0f}",
                f"{1000 * usd / count:.2f}",
                f"{1000 * batched / count:.2f}",
                f"{1000 * proof_s / count:.1f}",
            )
        )
    show(
        f"The coarse call of recorded replies, {CHARACTERS_PER_TOKEN} characters a token, "
        f"{PRICES.price_in} and {PRICES.price_out} dollars per million",
        ("protocol", "accepted", "prompt", "reply", "$ per 1000", "as a batch", "ms without LLM"),
        rows,
    )


def clocked(record: Record, chat: Recorded) -> tuple[float, Record]:
    """Stage 1 of one record, whose LLM takes no time."""
    started = time.perf_counter()
    pruned = asyncio.run(coarse_prune(record, chat))
    return time.perf_counter() - started, pruned


def proof() -> None:
    """Milliseconds of the verdict on a faithful reply, every real trace."""
    rows = []
    all_traces = traces("cot_code") + (traces("cot_math") if data_folder() else [])
    for name, config in (
        ("word alignment (default)", PruneConfig()),
        ("Algorithm 1 (paper)", PruneConfig(preset="paper", require_code=False)),
    ):
        seconds = []
        for trace in all_traces:
            triple = Triple(question="q", cot=trace["cot"], answer="a")
            record = Record(triple=triple, config=config)
            reply = "\n\n".join(split_steps(trace["cot"], config.split)[::2])
            seconds.append(best_of(1, lambda r=reply, of=record: prove_reply(r, of))[0])
        seconds.sort()
        at = [seconds[len(seconds) // 2], seconds[len(seconds) * 99 // 100], seconds[-1]]
        rows.append((name, len(seconds), *(f"{1000 * s:.2f}" for s in at)))
    show("The proof of one reply, ms", ("proof", "traces", "median", "p99", "most"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("slots", nargs="*", type=int, default=list(SLOTS))
    speed(parser.parse_args().slots)
    price()
    proof()


if __name__ == "__main__":
    main()
