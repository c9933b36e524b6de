"""The worker outlives what it finds in Redis, and its process ends as an operator expects."""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from asap_runtime.celery_queue import CeleryQueue
from asap_runtime.queue import Message
from engines.redis_server import missing, serve
from waiting import PATIENCE_S, until

pytestmark = [
    pytest.mark.contract,
    # Celery warns at each lost connection that the default of a setting we set will change.
    pytest.mark.filterwarnings("ignore::celery.exceptions.CPendingDeprecationWarning"),
]

PROCESS = """
import asyncio, os, signal, sys
from asap_runtime import celery_queue
from asap_runtime.brokers import open_queue

celery_queue.DRAIN_S = 60.0  # what it gives back has arrived before it ends

async def main():
    queue, ended = open_queue(sys.argv[1]), asyncio.Event()
    async def handler(message):
        print("started", *message.item_ids, flush=True)
        try:
            await asyncio.sleep(float(sys.argv[2]))
            print("done", *message.item_ids, flush=True)
        except asyncio.CancelledError:
            print("cancelled", *message.item_ids, flush=True)
            raise
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    queue.consume("process", handler, concurrency=2)
    print("ready", flush=True)
    await ended.wait()
    await queue.drain()
    queue.close()

asyncio.run(main())
"""


@pytest.fixture(autouse=True)
def no_worker_outlives_its_test(monkeypatch):
    """It would meddle with the next: Celery's state is the process's."""
    monkeypatch.setattr("asap_runtime.celery_queue.DRAIN_S", PATIENCE_S)


@pytest.fixture
def server():
    if reason := missing():
        pytest.skip(reason)
    with serve() as running:
        yield running


def envelope(**changes: object) -> str:
    """A message as Celery writes it, with changes; in a mapping, `...` leaves the key out."""
    tag = str(uuid.uuid4())
    parts = {
        "body": call(**Message("garbage", ("right",)).to_wire()),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"lang": "py", "task": "asap.run", "id": tag, "root_id": tag},
        "properties": {
            "correlation_id": tag,
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": "asap.garbage"},
            "priority": 5,
            "body_encoding": "base64",
            "delivery_tag": tag,
        },
    }
    for name, change in changes.items():
        key = name.replace("_", "-")
        if isinstance(change, dict):
            merged = parts[key] | change
            change = {inner: value for inner, value in merged.items() if value is not ...}
        parts[key] = change
    return json.dumps(parts)


def call(*args, **kwargs) -> str:
    return base64.b64encode(json.dumps([args, kwargs, {}]).encode()).decode()


GARBAGE = {
    "no JSON": "{broken",
    "no text": b"\xff\xfe\x00",
    "nothing": "",
    "a number": "1",
    "a list": "[]",
    "an empty object": "{}",
    "no properties": json.dumps({"body": "", "headers": {}}),
    "no delivery tag": envelope(properties={"delivery_tag": ...}),
    "no delivery info": envelope(properties={"delivery_info": ...}),
    "headers are a list": envelope(headers=[]),
    "headers are null": envelope(headers=None),
    "no task": envelope(headers={"task": ...}),
    "no id": envelope(headers={"id": ...}),
    "task is a list": envelope(headers={"task": []}),
    "unknown task": envelope(headers={"task": "os.system"}),
    "unknown task without id": envelope(headers={"task": "os.system", "id": ...}),
    "a task of Celery": envelope(headers={"task": "celery.backend_cleanup"}),
    "not before the year 9999": envelope(headers={"eta": "9999-01-01T00:00:00"}),
    "expired long ago": envelope(headers={"expires": "1999-01-01T00:00:00"}),
    "expires never heard of": envelope(headers={"expires": "soon"}),
    "pickled": envelope(content_type="application/x-python-serialize"),
    "body is no base64": envelope(body="!!!"),
    "body is no JSON": envelope(body=base64.b64encode(b"{").decode()),
    "body is an object": envelope(body=base64.b64encode(b"{}").decode()),
    "body is null": envelope(body=None),
    "body is a number": envelope(body=7),
    "positional arguments": envelope(body=call(1, 2)),
    "no arguments": envelope(body=call()),
    "wrong arguments": envelope(body=call(color="red")),
    "wrong types": envelope(body=call(stage=1, item_ids="x", priority=[], trace=None)),
    "too many items": envelope(
        body=call(stage="garbage", item_ids=["x"] * 65, priority=5, trace={})
    ),
    "another stage": envelope(body=call(stage="other", item_ids=["x"], priority=5, trace={})),
}


async def test_garbage_has_no_effect(server, capfd):
    queue, seen = CeleryQueue(server.url), []

    async def handler(message):
        seen.extend(message.item_ids)

    queue.consume("garbage", handler, concurrency=2)
    queue.publish(Message("garbage", ("first",)))
    await until(lambda: seen == ["first"])
    worker = queue._consumer.worker
    with server.client() as client:
        for n, item in enumerate(GARBAGE.values()):
            client.lpush("asap.garbage", item)
            assert queue.publish(Message("garbage", (str(n),)))
            await until(lambda wanted=n: seen[-1] == str(wanted))
        client.lpush("asap.garbage", envelope())
        await until(lambda: seen[-1] == "right")
        await until(lambda: client.hlen("unacked") == 0)

    assert seen == ["first", *map(str, range(len(GARBAGE))), "right"]
    assert queue._consumer.worker is worker, "the worker was replaced"
    assert sum(queue.discarded.values()) >= len(GARBAGE) - 8
    await queue.drain()
    queue.close()


async def test_garbage_among_the_unacknowledged_does_not_stop_a_worker(server):
    with server.client() as client:
        client.hset("unacked", "tag", "{broken")
        client.zadd("unacked_index", {"tag": 1})
    queue, seen = CeleryQueue(server.url), []

    async def handler(message):
        seen.extend(message.item_ids)

    queue.consume("garbage", handler, concurrency=1)
    queue.publish(Message("garbage", ("1",)))

    await until(lambda: seen == ["1"])
    await queue.drain()
    queue.close()


def held_by_workers(client) -> set[str]:
    """The items whose messages were delivered and not yet acknowledged."""
    held = []
    for text in client.hvals("unacked"):
        message, *_ = json.loads(text)
        if message["headers"]["task"] == "asap.run":
            _, call, _ = json.loads(base64.b64decode(message["body"]))
            held += call["item_ids"]
    return set(held)


class Process:
    """A worker in a process of its own."""

    def __init__(self, url: str, item_s: float, log: Path) -> None:
        self.log = log
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROCESS, url, str(item_s)], stdout=stream
            )

    def has_said(self, *lines: str) -> bool:
        return set(lines) <= set(self.log.read_text().splitlines())

    def end(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)


@pytest.fixture
def start(server, tmp_path):
    processes: list[Process] = []

    def run(item_s: float) -> Process:
        processes.append(Process(server.url, item_s, tmp_path / f"{len(processes)}.log"))
        return processes[-1]

    yield run
    for process in processes:
        process.end()


async def test_sigterm_cancels_and_exits_with_zero(server, start):
    queue, worker = CeleryQueue(server.url), start(3600)
    for n in range(5):
        queue.publish(Message("process", (str(n),)))
    await until(lambda: worker.has_said("started 0", "started 1"))

    worker.process.send_signal(signal.SIGTERM)

    assert worker.process.wait(PATIENCE_S) == 0
    assert worker.has_said("cancelled 0", "cancelled 1")
    await until(lambda: queue.pending("process") == 5)
    queue.close()


async def test_an_idle_process_exits_with_zero(start):
    worker = start(0)
    await until(lambda: worker.has_said("ready"))
    worker.process.send_signal(signal.SIGTERM)
    assert worker.process.wait(PATIENCE_S) == 0


async def test_a_killed_process_takes_only_the_messages_it_had(server, start):
    """Redis returns those after the visibility time-out; the sweeper publishes their rows first."""
    queue, killed = CeleryQueue(server.url), start(3600)
    for n in range(6):
        queue.publish(Message("process", (str(n),)))
    await until(lambda: killed.has_said("started 0", "started 1"))
    killed.process.kill()
    killed.process.wait(PATIENCE_S)
    heir = start(0)

    await until(lambda: heir.has_said(*(f"done {n}" for n in range(2, 6))))

    with server.client() as client:  # the last acknowledgement follows the last word
        await until(lambda: held_by_workers(client) == {"0", "1"})
    assert not heir.has_said("started 0")
    assert not heir.has_said("started 1")
    queue.close()
