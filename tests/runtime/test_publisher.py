"""How many items are named to the queue, on real SQLite and the memory queue."""

from __future__ import annotations

import pytest

from asap_runtime.database import Database, open_engine
from asap_runtime.migrate import upgrade
from asap_runtime.publisher import PER_SLOT, WINDOW, Publisher
from asap_runtime.queue import BATCH, LIVE, MemoryQueue
from job_store import Platform


@pytest.fixture
def platform(tmp_path):
    url = f"sqlite:///{tmp_path / 'asap.db'}"
    upgrade(url)
    database = Database(open_engine(url))
    yield Platform(database)
    database.close()


class Queue(MemoryQueue):
    """Shows what was published; can lose it all, and be full."""

    def __init__(self):
        super().__init__()
        self.messages, self.full = [], False

    def publish(self, message):
        if self.full:
            return False
        self.messages.append(message)
        return True

    def pending(self, stage):
        return sum(message.stage == stage for message in self.messages)

    def items(self):
        return [int(item_id) for message in self.messages for item_id in message.item_ids]


def publish(platform, queue, **options):
    publisher = Publisher(platform.sweep, queue)
    room = publisher.room("one")
    return publisher.publish("one", platform.sweep.due("one", max(room, 64)), room, **options)


def test_a_window_of_a_big_job_is_published_and_remembered(platform):
    platform.job(3 * WINDOW)
    queue = Queue()
    assert publish(platform, queue) == WINDOW
    assert publish(platform, queue) == 0
    assert len(set(queue.items())) == WINDOW
    assert max(len(message.item_ids) for message in queue.messages) == 64
    assert platform.sweep.load("one").published == WINDOW


def test_claimed_items_make_room_and_running_ones_widen_the_window(platform):
    platform.job(3 * WINDOW)
    queue = Queue()
    publish(platform, queue)
    running = 0
    while running * PER_SLOT <= WINDOW:
        running += len(platform.store.claim(queue.items()[running : running + 64], "one", "w"))
    published = publish(platform, queue)
    assert published == running * PER_SLOT - (WINDOW - running)


def test_live_items_are_published_whatever_waits(platform):
    platform.job(2 * WINDOW, priority=BATCH)
    queue = Queue()
    publish(platform, queue)
    platform.job(3, priority=LIVE)
    assert publish(platform, queue) == 3
    assert queue.messages[-1].priority == LIVE
    assert len(queue.messages[-1].item_ids) == 3


def test_a_message_is_of_one_priority(platform):
    platform.job(3, priority=BATCH)
    platform.job(3, priority=LIVE)
    queue = Queue()
    assert publish(platform, queue, trace={"traceparent": "x"}) == 6
    assert [message.priority for message in queue.messages] == [LIVE, BATCH]
    assert {message.trace["traceparent"] for message in queue.messages} == {"x"}


def test_a_broker_that_lost_its_messages_has_room_at_once(platform):
    platform.job(3 * WINDOW)
    queue = Queue()
    publish(platform, queue)
    first = set(queue.items())
    queue.messages.clear()
    assert publish(platform, queue) == WINDOW
    assert not first & set(queue.items())  # those come again when they are forgotten
    platform.pass_time(61)
    queue.messages.clear()
    publish(platform, queue)
    assert first == set(queue.items())


def test_messages_that_still_wait_are_not_published_again(platform):
    """Else a stage that needs an hour for its window would get it sixty times."""
    platform.job(WINDOW)
    queue = Queue()
    publish(platform, queue)
    platform.pass_time(3600)
    assert publish(platform, queue) == 0


def test_what_the_queue_refuses_stays_due(platform):
    platform.job(10)
    queue = Queue()
    queue.full = True
    assert publish(platform, queue) == 0
    queue.full = False
    assert publish(platform, queue) == 10
