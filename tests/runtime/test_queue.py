from __future__ import annotations

import json
import threading
import uuid
from dataclasses import FrozenInstanceError

import pytest

from asap.errors import InvalidInput, Misconfigured
from asap_runtime.brokers import open_queue
from asap_runtime.queue import BACKGROUND, BATCH, LIVE, Backlog, MemoryQueue, Message
from waiting import PATIENCE_S


def test_a_message_survives_the_wire():
    ids = tuple(str(uuid.uuid4()) for _ in range(64))
    message = Message("anchor", ids, LIVE, {"traceparent": "00-" + "a" * 32 + "-" + "b" * 16})

    assert Message.from_wire(json.loads(json.dumps(message.to_wire()))) == message


def test_a_message_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        Message("anchor", ("1",)).stage = "surprisal"


@pytest.mark.parametrize(
    "fields",
    [
        {"stage": ""},
        {"stage": "Anchor"},
        {"stage": "a b"},
        {"stage": "a" * 64},
        {"stage": None},
        {"item_ids": ()},
        {"item_ids": ("1",) * 65},
        {"item_ids": ["1"]},
        {"item_ids": ("",)},
        {"item_ids": ("1" * 129,)},
        {"item_ids": (1,)},
        {"priority": 1},
        {"priority": "0"},
        {"priority": False},
        {"priority": 5.0},
        {"trace": {"traceparent": 1}},
        {"trace": {"traceparent": "x" * 1025}},
        {"trace": [("a", "b")]},
    ],
    ids=repr,
)
def test_refuses_what_no_publisher_sends(fields):
    with pytest.raises(InvalidInput):
        Message(**({"stage": "anchor", "item_ids": ("1",)} | fields))


@pytest.mark.parametrize(
    "change",
    [{"item_ids": None}, {"item_ids": "1"}, {"item_ids": {"1": 1}}, {"color": "red"}],
    ids=repr,
)
def test_refuses_a_foreign_object(change):
    with pytest.raises(InvalidInput):
        Message.from_wire(Message("anchor", ("1",)).to_wire() | change)


def test_refuses_an_object_that_lacks_a_field():
    with pytest.raises(InvalidInput):
        Message.from_wire({"stage": "anchor", "item_ids": ["1"]})


@pytest.mark.parametrize("url", ["amqp://localhost", "memory", ""])
def test_refuses_an_unknown_scheme(url):
    with pytest.raises(Misconfigured, match="memory://"):
        open_queue(url)


def test_opens_the_memory_queue():
    assert isinstance(open_queue("memory://"), MemoryQueue)


def test_a_backlog_hands_out_live_first_and_keeps_order():
    backlog = Backlog()
    sent = [(BACKGROUND, "1"), (BATCH, "2"), (LIVE, "3"), (BATCH, "4"), (LIVE, "5")]
    for priority, item_id in sent:
        assert backlog.offer(Message("anchor", (item_id,), priority))

    taken = [backlog.take().item_ids[0] for _ in sent]

    assert taken == ["3", "5", "2", "4", "1"]
    assert backlog.take() is None


def test_a_backlog_full_of_batch_has_room_for_live():
    backlog = Backlog(capacity=2)
    offered = [backlog.offer(Message("anchor", (str(n),), BATCH)) for n in range(3)]

    assert offered == [True, True, False]
    assert backlog.offer(Message("anchor", ("live",), LIVE))
    assert len(backlog) == 3


def test_a_backlog_makes_room_as_it_is_emptied():
    backlog = Backlog(capacity=1)
    for n in range(3):
        assert backlog.offer(Message("anchor", (str(n),)))
        assert backlog.take().item_ids == (str(n),)


def test_a_backlog_loses_nothing_between_threads():
    backlog, taken = Backlog(), []

    def publish(start):
        for n in range(start, start + 200):
            assert backlog.offer(Message("anchor", (str(n),)))

    def take():
        while len(taken) < 800:
            if message := backlog.take():
                taken.append(int(message.item_ids[0]))

    threads = [threading.Thread(target=publish, args=(n * 200,)) for n in range(4)]
    threads.append(threading.Thread(target=take))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert sorted(taken) == list(range(800))
