"""What every task queue promises, shown on the memory queue and on a real Redis."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter

import pytest

from asap.errors import Misconfigured
from asap_runtime.brokers import open_queue
from asap_runtime.queue import BACKGROUND, BATCH, LIVE, MemoryQueue, Message
from waiting import PATIENCE_S, until

pytestmark = [
    # Celery warns at each lost connection that the default of a setting we set will change.
    pytest.mark.filterwarnings("ignore::celery.exceptions.CPendingDeprecationWarning"),
]


@pytest.fixture(scope="module")
def redis_url():
    from engines.redis_server import missing, serve

    if reason := missing():
        pytest.skip(reason)
    with serve() as server:
        yield server.url


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.contract)])
def url(request):
    return "memory://" if request.param == "memory" else request.getfixturevalue("redis_url")


@pytest.fixture
async def queue(url, monkeypatch):
    # A worker that outlived its test would meddle with the next: Celery's state is the process's.
    monkeypatch.setattr("asap_runtime.celery_queue.DRAIN_S", PATIENCE_S)
    opened = open_queue(url)
    yield opened
    await opened.drain()
    opened.close()


class Stage:
    """A handler that notes what it gets and holds every message until it is told to go on."""

    def __init__(self, *, held: bool = False) -> None:
        self.messages: list[Message] = []
        self.ended: list[str] = []
        self.cancelled: list[str] = []
        self.running = self.most_running = 0
        self.go_on = asyncio.Event()
        if not held:
            self.go_on.set()

    async def __call__(self, message: Message) -> None:
        self.messages.append(message)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await self.go_on.wait()
            self.ended.extend(message.item_ids)
        except asyncio.CancelledError:
            self.cancelled.extend(message.item_ids)
            raise
        finally:
            self.running -= 1


def answers(queue) -> list[bool]:
    """Of a hundred messages. A publisher that talked to a lost broker would need minutes."""
    ends = time.monotonic() + PATIENCE_S
    accepted = [queue.publish(Message("lost", (str(n),))) for n in range(100)]
    assert time.monotonic() < ends, "it talks to the broker"
    return accepted


def publish_all(queue, stage: str, count: int, priority: int = BATCH) -> list[str]:
    ids = [f"{priority}-{n}" for n in range(count)]
    assert all(queue.publish(Message(stage, (item_id,), priority)) for item_id in ids)
    return ids


async def test_every_message_is_delivered_as_it_was_sent(queue):
    stage = Stage()
    sent = [
        Message(
            "whole", tuple(f"{n}-{i}" for i in range(1 + n % 64)), priority, {"traceparent": "x"}
        )
        for n in range(100)
        for priority in (LIVE, BATCH, BACKGROUND)
    ]
    for message in sent[:150]:
        assert queue.publish(message)
    queue.consume("whole", stage, concurrency=4)
    for message in sent[150:]:
        assert queue.publish(message)

    await until(lambda: len(stage.messages) >= len(sent))

    assert Counter(map(str, stage.messages)) == Counter(map(str, sent))


async def test_stages_do_not_see_each_other(queue):
    stage = Stage()
    queue.consume("mine", stage, concurrency=2)
    publish_all(queue, "other", 3)
    mine = publish_all(queue, "mine", 3, LIVE)

    await until(lambda: len(stage.ended) >= 3)
    await asyncio.sleep(0.1)

    assert sorted(stage.ended) == mine


async def test_publishing_from_other_threads_is_safe(queue):
    stage = Stage()
    queue.consume("threads", stage, concurrency=4)
    refused = []

    def publish(thread):
        for n in range(50):
            if not queue.publish(Message("threads", (f"{thread}-{n}",))):
                refused.append(n)

    threads = [threading.Thread(target=publish, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()

    await until(lambda: len(stage.ended) >= 200)

    assert not refused
    assert len(set(stage.ended)) == 200


async def test_a_failing_handler_loses_no_later_message(queue):
    seen = []

    async def handler(message):
        seen.append(message.item_ids[0])
        if len(seen) % 2:
            raise RuntimeError("a defect of the handler")

    queue.consume("failing", handler, concurrency=1)
    sent = publish_all(queue, "failing", 20)

    await until(lambda: len(seen) >= 20)

    assert sorted(seen) == sorted(sent)


async def test_live_overtakes_everything_that_waits(queue):
    stage = Stage(held=True)
    queue.consume("overtaking", stage, concurrency=1)
    publish_all(queue, "overtaking", 1, BACKGROUND)
    await until(lambda: stage.running == 1)
    publish_all(queue, "overtaking", 30, BACKGROUND)
    publish_all(queue, "overtaking", 30, BATCH)
    publish_all(queue, "overtaking", 3, LIVE)
    publish_all(queue, "sent-last", 1, BACKGROUND)
    await until(lambda: stage.running == 2 and queue.pending("sent-last") == 1)
    stage.go_on.set()
    stage.go_on.clear()  # two at a time: what is in hand together may start in any order
    await until(lambda: len(stage.messages) == 4)
    stage.go_on.set()

    await until(lambda: len(stage.ended) == 64)

    priorities = [message.priority for message in stage.messages[1:]]
    assert priorities == [LIVE] * 3 + [BATCH] * 30 + [BACKGROUND] * 30


async def test_concurrency_is_reached_and_never_exceeded(queue):
    stage = Stage(held=True)
    queue.consume("bounded", stage, concurrency=5)
    publish_all(queue, "bounded", 40)

    await until(lambda: stage.running == 5)
    await asyncio.sleep(0.2)
    assert stage.most_running == 5
    await until(lambda: queue.self_message_age_s() < 5)
    stage.go_on.set()
    await until(lambda: len(stage.ended) == 40)

    assert stage.most_running == 5


async def test_a_live_message_does_not_wait_for_batch_messages(queue):
    stage = Stage(held=True)
    queue.consume("reserved", stage, concurrency=2)
    publish_all(queue, "reserved", 10)
    await until(lambda: stage.running == 2)

    for n in range(2):
        queue.publish(Message("reserved", (f"live-{n}",), LIVE))
        await until(lambda wanted=n: stage.running == 3 + wanted)
    queue.publish(Message("reserved", ("live-2",), LIVE))
    await asyncio.sleep(0.2)

    assert stage.running == 4
    assert queue.self_message_age_s() == 0.0
    stage.go_on.set()
    await until(lambda: len(stage.ended) == 13)


async def test_messages_of_many_items_stay_in_the_queue(queue):
    """They would wait for room in this process, where no other one can take them."""
    stage = Stage(held=True)
    queue.consume("large", stage, concurrency=64)
    for n in range(10):
        queue.publish(Message("large", tuple(f"{n}-{i}" for i in range(64))))

    await until(lambda: stage.running == 2 and queue.pending("large") == 8)
    await asyncio.sleep(0.2)

    assert stage.running == 2
    stage.go_on.set()
    await until(lambda: len(stage.ended) == 640)


async def test_a_free_slot_is_used_at_once(queue):
    seen = []

    async def handler(message):
        seen.append(message)

    queue.consume("prompt", handler, concurrency=1)
    queue.publish(Message("prompt", ("warm",)))
    await until(lambda: len(seen) == 1)
    publish_all(queue, "prompt", 100)

    await until(lambda: len(seen) == 101)  # waiting for the next poll each time takes 100 s


async def test_pending_counts_all_priorities(queue):
    for priority in (LIVE, BATCH, BACKGROUND):
        publish_all(queue, "counted", 2, priority)

    await until(lambda: queue.pending("counted") == 6)


async def test_is_healthy_and_young_while_it_works(queue):
    queue.consume("young", Stage(), concurrency=1)

    await until(queue.healthy)
    await until(lambda: queue.self_message_age_s() < 5)


async def test_a_stage_has_one_consumer(queue):
    queue.consume("single", Stage(), concurrency=1)
    with pytest.raises(Misconfigured):
        queue.consume("single", Stage(), concurrency=1)


async def test_after_stop_claiming_running_handlers_end_and_none_starts(queue):
    stage = Stage(held=True)
    queue.consume("stopping", stage, concurrency=2)
    publish_all(queue, "stopping", 10)
    await until(lambda: stage.running == 2)

    queue.stop_claiming()
    await asyncio.sleep(0.2)
    stage.go_on.set()
    await until(lambda: len(stage.ended) == 2)
    await asyncio.sleep(0.3)

    assert len(stage.messages) == 2
    assert stage.cancelled == []


async def test_after_stop_claiming_an_idle_consumer_leaves_messages_alone(queue):
    stage = Stage()
    queue.consume("idle", stage, concurrency=2)
    queue.publish(Message("idle", ("first",)))
    await until(lambda: stage.ended == ["first"])

    queue.stop_claiming()
    await asyncio.sleep(0.2)
    publish_all(queue, "idle", 3)

    await until(lambda: queue.pending("idle") == 3)
    assert stage.ended == ["first"]


async def test_drain_cancels_who_would_go_on(queue):
    stage = Stage(held=True)
    queue.consume("draining", stage, concurrency=4)
    publish_all(queue, "draining", 10)
    await until(lambda: stage.running == 4)

    async with asyncio.timeout(PATIENCE_S):  # the handlers never end by themselves
        await queue.drain()

    assert len(stage.cancelled) == 4
    assert len(stage.messages) == 4


async def test_drain_does_not_wait_for_a_stubborn_handler(queue, monkeypatch):
    started, released = asyncio.Event(), asyncio.Event()

    async def stubborn(message):
        started.set()
        while not released.is_set():
            try:
                await released.wait()
            except asyncio.CancelledError:
                continue

    queue.consume("stubborn", stubborn, concurrency=1)
    publish_all(queue, "stubborn", 1)
    await asyncio.wait_for(started.wait(), PATIENCE_S)
    try:
        with monkeypatch.context() as limits:
            limits.setattr("asap_runtime.celery_queue.DRAIN_S", 0.5)
            async with asyncio.timeout(PATIENCE_S):  # the handler never ends by itself
                await queue.drain()
    finally:
        released.set()


async def test_drain_without_consumers_and_twice_is_harmless(queue):
    await queue.drain()
    await queue.drain()


async def test_refuses_at_once_when_closed(url):
    queue = open_queue(url)
    queue.close()

    assert not any(answers(queue))
    assert not queue.healthy()


def _small(kind):
    if kind == "memory":
        return MemoryQueue(capacity=3)
    from asap_runtime.celery_queue import CeleryQueue

    return CeleryQueue("redis://127.0.0.1:1/0", capacity=3)  # nobody listens there


@pytest.mark.parametrize("kind", ["memory", "redis"])
def test_a_full_queue_refuses_at_once(kind):
    queue = _small(kind)
    accepted = answers(queue)

    assert sum(accepted) <= 3
    assert not accepted[-1]
    queue.close()
