"""What only a broker can do: be down, be black-holed, come back empty, give messages back."""

from __future__ import annotations

import asyncio
import signal
import time

import pytest

from asap.errors import Misconfigured
from asap_runtime.celery_queue import CeleryQueue
from asap_runtime.queue import LIVE, Message
from engines.redis_server import missing, serve
from waiting import PATIENCE_S, until

pytestmark = [
    pytest.mark.contract,
    # Celery warns at each lost connection that the default of a setting we set will change.
    pytest.mark.filterwarnings("ignore::celery.exceptions.CPendingDeprecationWarning"),
]


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


@pytest.fixture
async def queue(server):
    opened = CeleryQueue(server.url)
    yield opened
    await opened.drain()
    opened.close()


async def arrives(queue, stage: str, item_id: str, seen) -> None:
    """Publish every half second, as the sweeper would, until it was seen."""
    published_at = 0.0

    def was_seen() -> bool:
        nonlocal published_at
        if time.monotonic() >= published_at + 0.5:
            published_at = time.monotonic()
            queue.publish(Message(stage, (item_id,), LIVE))
        return item_id in seen

    await until(was_seen)


def answers(queue, stage: str) -> list[bool]:
    """Of a hundred messages. A publisher that talked to a lost broker would need minutes."""
    ends = time.monotonic() + PATIENCE_S
    accepted = [queue.publish(Message(stage, (str(n),))) for n in range(100)]
    assert time.monotonic() < ends, "it talks to the broker"
    return accepted


async def test_refuses_at_once_while_the_broker_is_down(queue, server):
    await until(queue.healthy)
    server.kill()
    await until(lambda: not queue.healthy())

    assert not any(answers(queue, "down"))
    assert queue.pending("down") is None

    server.start()
    await until(queue.healthy)
    assert queue.publish(Message("down", ("2",)))
    await until(lambda: queue.pending("down") == 1)


async def test_never_blocks_on_a_broker_that_does_not_answer(server):
    queue = CeleryQueue(server.url, capacity=20)
    await until(queue.healthy)
    server.signal(signal.SIGSTOP)
    try:
        assert not answers(queue, "stuck")[-1]
        await until(lambda: not queue.healthy())
    finally:
        server.signal(signal.SIGCONT)
    await until(queue.healthy)
    queue.close()


@pytest.mark.parametrize("empty", [True, False])
async def test_messages_flow_again_after_the_broker_was_killed(queue, server, empty):
    seen: list[str] = []

    async def handler(message):
        seen.extend(message.item_ids)

    queue.consume("again", handler, concurrency=2)
    await arrives(queue, "again", "before", seen)
    for round_ in range(2):
        server.restart(empty=empty)
        await arrives(queue, "again", f"after-{round_}", seen)
    await until(lambda: queue.self_message_age_s() < 10)


async def test_a_broker_that_dies_under_load_does_not_end_the_worker(queue, server):
    seen: set[str] = set()

    async def handler(message):
        await asyncio.sleep(0.02)
        seen.update(message.item_ids)

    queue.consume("load", handler, concurrency=4)
    await until(lambda: queue._consumer.worker is not None)
    worker = queue._consumer.worker
    for round_ in range(3):
        for n in range(100):
            queue.publish(Message("load", (f"{round_}-{n}",)))
        await arrives(queue, "load", f"{round_}-under-way", seen)
        server.restart(empty=True)
        await arrives(queue, "load", f"{round_}-again", seen)
    assert queue._consumer.worker is worker, "the worker was replaced"


async def test_a_worker_that_was_full_when_the_broker_died_goes_on(queue, server):
    """Nothing reads from the connection then; only the failed acknowledgement shows the loss."""
    started, go_on, seen = asyncio.Event(), asyncio.Event(), []

    async def handler(message):
        started.set()
        await go_on.wait()
        seen.extend(message.item_ids)

    queue.consume("full", handler, concurrency=1)
    queue.publish(Message("full", ("before",)))
    await asyncio.wait_for(started.wait(), PATIENCE_S)
    worker = queue._consumer.worker
    server.kill()
    go_on.set()
    await until(lambda: seen == ["before"])
    await asyncio.sleep(0.3)
    server.start()

    await arrives(queue, "full", "after", seen)
    assert queue._consumer.worker is worker, "the worker was replaced"


async def test_a_handler_that_outlives_its_connection_harms_nothing(queue, server):
    started, go_on, seen = asyncio.Event(), asyncio.Event(), []

    async def handler(message):
        if message.item_ids == ("long",):
            started.set()
            await go_on.wait()
        seen.extend(message.item_ids)

    queue.consume("outlived", handler, concurrency=2)
    queue.publish(Message("outlived", ("long",)))
    await asyncio.wait_for(started.wait(), PATIENCE_S)
    worker = queue._consumer.worker
    server.restart(empty=True)
    await arrives(queue, "outlived", "meanwhile", seen)
    go_on.set()
    await until(lambda: "long" in seen)
    await asyncio.sleep(0.2)

    await arrives(queue, "outlived", "after", seen)
    assert queue._consumer.worker is worker, "the worker was replaced"


async def test_a_consumer_that_starts_before_its_broker_waits_for_it(server):
    server.kill()
    queue, seen = CeleryQueue(server.url), []

    async def handler(message):
        seen.extend(message.item_ids)

    queue.consume("early", handler, concurrency=1)
    await until(lambda: not queue.healthy())
    await asyncio.sleep(0.5)
    server.start()
    await until(queue.healthy)
    queue.publish(Message("early", ("1",)))

    await until(lambda: seen == ["1"])
    await queue.drain()
    queue.close()


async def test_drains_while_the_broker_is_down(queue, server):
    queue.consume("dark", _nothing, concurrency=1)
    await until(queue.healthy)
    server.kill()
    await until(lambda: not queue.healthy())

    async with asyncio.timeout(PATIENCE_S):
        await queue.drain()


async def test_a_flush_under_a_live_connection_stops_nothing(queue, server):
    seen = []

    async def handler(message):
        seen.extend(message.item_ids)

    queue.consume("flushed", handler, concurrency=1)
    queue.publish(Message("flushed", ("1",)))
    await until(lambda: seen == ["1"])
    server.empty()
    queue.publish(Message("flushed", ("2",)))

    await until(lambda: seen == ["1", "2"])


async def test_the_message_of_a_cancelled_handler_goes_back(server):
    first, second, seen = CeleryQueue(server.url), CeleryQueue(server.url), []
    started = asyncio.Event()

    async def endless(message):
        started.set()
        await asyncio.sleep(3600)

    async def handler(message):
        seen.extend(message.item_ids)

    first.consume("returned", endless, concurrency=1)
    first.publish(Message("returned", ("1",)))
    await asyncio.wait_for(started.wait(), PATIENCE_S)
    await first.drain()
    first.close()
    second.consume("returned", handler, concurrency=1)

    await until(lambda: seen == ["1"])
    await second.drain()
    second.close()


async def test_a_handled_message_leaves_nothing_behind(queue, server):
    seen = []

    async def handler(message):
        seen.extend(message.item_ids)

    queue.consume("tidy", handler, concurrency=4)
    for n in range(50):
        queue.publish(Message("tidy", (str(n),)))
    await until(lambda: len(seen) == 50)
    with server.client() as client:
        await until(lambda: client.hlen("unacked") == 0)
        assert client.llen("asap.tidy") == 0


async def test_the_message_to_itself_arrives_and_expires(queue, server, monkeypatch):
    monkeypatch.setattr("asap_runtime.celery_queue.SELF_MESSAGE_S", 0.5)
    queue.consume("alive", _nothing, concurrency=1)
    started = time.monotonic()
    await until(lambda: queue.self_message_age_s() < time.monotonic() - started - 1)
    await queue.drain()
    await until(lambda: queue.self_message_age_s() > 1.5)

    with server.client() as client:

        def lives_s():
            return [client.ttl(key) for key in client.keys("alive-*.dq2")]

        # A message is sent first, and its queue given an end a moment later.
        await until(lambda: (found := lives_s()) and all(0 < life_s <= 60 for life_s in found))


async def test_close_sends_what_was_accepted(server):
    queue, other = CeleryQueue(server.url), CeleryQueue(server.url)
    for n in range(200):
        assert queue.publish(Message("flush", (str(n),)))
    queue.close()

    await until(lambda: other.pending("flush") == 200)
    other.close()


async def test_a_process_consumes_one_stage(queue):
    queue.consume("one", _nothing, concurrency=1)
    with pytest.raises(Misconfigured, match="one stage"):
        queue.consume("two", _nothing, concurrency=1)


async def test_a_full_message_stays_small_in_redis(queue, server):
    ids = tuple(f"{n:036d}" for n in range(64))
    queue.publish(Message("size", ids))
    await until(lambda: queue.pending("size") == 1)
    with server.client() as client:
        size_bytes = len(client.lindex("asap.size\x06\x165", 0))
    assert size_bytes < 5000


async def _nothing(message):
    """A handler without work."""
