"""The task queue: messages that name items to be worked on. A hint that may vanish at any moment.

The database decides what is due; a message only saves the wait for the next look. So a queue may
lose, repeat and reorder messages, and knows nothing of items, leases or results.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import re
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol

import structlog

from asap.errors import InvalidInput, Misconfigured

__all__ = [
    "BACKGROUND",
    "BATCH",
    "LIVE",
    "MAX_ITEMS",
    "Backlog",
    "Handler",
    "Handlers",
    "MemoryQueue",
    "Message",
    "Slots",
    "TaskQueue",
]

LIVE: Final = 0
BATCH: Final = 5
BACKGROUND: Final = 9
PRIORITIES: Final = (LIVE, BATCH, BACKGROUND)

MAX_ITEMS: Final = 64
"""Items per message: one claim of 64 costs little more than one of a single item."""
MAX_TEXT: Final = 128
"""Characters of an item id; a trace header may have eight times as many."""
CAPACITY: Final = 1000
"""Messages that wait inside the process, for each stage and priority."""
DRAIN_S: Final = 1.5
"""How long `drain` waits for cancelled handlers."""

_STAGE = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Message:
    """Some items of one stage and priority that may be due."""

    stage: str
    item_ids: tuple[str, ...]
    """1 to 64."""
    priority: int = BATCH
    """0 live, 5 batch, 9 background; the lower one overtakes."""
    trace: dict[str, str] = field(default_factory=dict)
    """W3C trace context: header name to value."""

    def __post_init__(self) -> None:
        """Refuse what no publisher of ours sends: messages come over the wire, too."""
        if not isinstance(self.stage, str) or not _STAGE.fullmatch(self.stage):
            raise InvalidInput("the stage of a message is a short name in lower case")
        if not isinstance(self.item_ids, tuple) or not 1 <= len(self.item_ids) <= MAX_ITEMS:
            raise InvalidInput(f"a message names 1 to {MAX_ITEMS} items")
        if not all(_is_text(item_id, MAX_TEXT) for item_id in self.item_ids):
            raise InvalidInput(f"an item id is a string of 1 to {MAX_TEXT} characters")
        if type(self.priority) is not int or self.priority not in PRIORITIES:
            raise InvalidInput(f"the priority of a message is one of {PRIORITIES}")
        if not isinstance(self.trace, dict) or not all(
            _is_text(part, 8 * MAX_TEXT) for pair in self.trace.items() for part in pair
        ):
            raise InvalidInput("the trace context of a message maps header names to values")

    def to_wire(self) -> dict[str, object]:
        """The message as a JSON object."""
        return {
            "stage": self.stage,
            "item_ids": list(self.item_ids),
            "priority": self.priority,
            "trace": self.trace,
        }

    @classmethod
    def from_wire(cls, fields: Mapping[str, object]) -> Message:
        """The inverse of `to_wire`; anything else is InvalidInput."""
        item_ids = fields.get("item_ids")
        if set(fields) != {"stage", "item_ids", "priority", "trace"}:
            raise InvalidInput("a message has a stage, item ids, a priority and a trace")
        if not isinstance(item_ids, list):
            raise InvalidInput("the item ids of a message are a list")
        return cls(**{**fields, "item_ids": tuple(item_ids)})  # type: ignore[arg-type]


def _is_text(value: object, longest: int) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= longest


Handler = Callable[[Message], Awaitable[None]]
"""Works on the items of one message. What it raises is logged; the items stay with the database."""


class TaskQueue(Protocol):
    """Where messages are left for stages. Only `drain` and `close` wait, for a bounded time."""

    def publish(self, message: Message) -> bool:
        """Hand over a message, from any thread. False: full or broker down, the row must wait."""
        ...

    def consume(self, stage: str, handler: Handler, *, concurrency: int) -> None:
        """Start handling a stage's messages on the running loop, with the `Slots` of that size."""
        ...

    def healthy(self) -> bool:
        """The broker answered lately (within about a second)."""
        ...

    def pending(self, stage: str) -> int | None:
        """Messages that wait for the stage, a second old at most; None while that is unknown."""
        ...

    def self_message_age_s(self) -> float:
        """Seconds since the consumer last showed that messages reach it; 0 without consumers."""
        ...

    def stop_claiming(self) -> None:
        """Take no further messages; running handlers go on."""
        ...

    async def drain(self) -> None:
        """Stop claiming, cancel the running handlers and wait for them, two seconds at most."""
        ...

    def close(self) -> None:
        """Give threads and connections back, after `drain`; waits a second for unsent messages."""
        ...


class Backlog:
    """Messages that wait in this process: bounded, the live ones first, in order of arrival.

    Each priority has its own bound, so waiting batch messages never refuse a live one. Safe to use
    from all threads; offering and taking cost O(log n).
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._heap: list[tuple[int, int, Message]] = []
        self._waiting: Counter[int] = Counter()
        self._arrivals = itertools.count()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._heap)

    def offer(self, message: Message) -> bool:
        """Add a message; False when its priority is full."""
        with self._lock:
            if self._waiting[message.priority] >= self._capacity:
                return False
            self._waiting[message.priority] += 1
            heapq.heappush(self._heap, (message.priority, next(self._arrivals), message))
            return True

    def take(self, last: int = BACKGROUND) -> Message | None:
        """Remove and return the next message, or None when there is none up to priority `last`."""
        with self._lock:
            if not self._heap or self._heap[0][0] > last:
                return None
            message = heapq.heappop(self._heap)[-1]
            self._waiting[message.priority] -= 1
            return message


class Slots:
    """What one consumer may have in hand: `concurrency` messages, and as many more that are live.

    Messages that are not live also end where their items do: one is taken ahead, the others stay
    in the queue, where another process can take them. Safe to use from all threads.
    """

    def __init__(self, concurrency: int) -> None:
        self.most = 2 * concurrency
        """Messages in hand at the same time."""
        self._concurrency = concurrency
        self._live = self._others = self._items = 0
        self._lock = threading.Lock()

    def accepts(self) -> int | None:
        """The last priority of which a message may be taken now; None: of none."""
        if self._live + self._others >= self.most:
            return None
        room = self._others < self._concurrency and self._items < self._concurrency + MAX_ITEMS
        return BACKGROUND if room else LIVE

    def hold(self, priority: int, items: int) -> None:
        """A message with so many items is in hand."""
        self._add(priority, 1, items)

    def release(self, priority: int, items: int) -> None:
        """It is not any more."""
        self._add(priority, -1, -items)

    def _add(self, priority: int, messages: int, items: int) -> None:
        with self._lock:
            if priority == LIVE:
                self._live += messages
            else:
                self._others += messages
                self._items += items


class Handlers:
    """The handlers that run on one loop. Lives on the loop's thread."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, handler: Handler, message: Message) -> asyncio.Task[None]:
        """Run the handler in a task that ends quietly, or cancelled."""
        task = asyncio.get_running_loop().create_task(_handle(handler, message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def cancel(self) -> None:
        """Cancel all and wait; those that still run after `DRAIN_S` are left behind."""
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            _, left = await asyncio.wait(tasks, timeout=DRAIN_S)
            if left:
                _log.warning("handlers.abandoned", handlers=len(left))


async def _handle(handler: Handler, message: Message) -> None:
    try:
        await handler(message)
    except Exception:
        # The handler books its own failures; this one is a defect, and the items' leases run out.
        _log.exception("message.failed", stage=message.stage, items=len(message.item_ids))


@dataclass(slots=True)
class _Consumer:
    handler: Handler
    slots: Slots
    loop: asyncio.AbstractEventLoop
    handlers: Handlers = field(default_factory=Handlers)


class MemoryQueue:
    """The queue of the embedded process: publishers and consumers share it as an object."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._backlogs: dict[str, Backlog] = {}
        self._consumers: dict[str, _Consumer] = {}
        self._lock = threading.Lock()
        self._claiming = True
        self._closed = False

    def publish(self, message: Message) -> bool:
        """Leave the message in the backlog of its stage; False when that is full."""
        with self._lock:
            if self._closed or not self._backlog(message.stage).offer(message):
                return False
            consumers = [c for stage, c in self._consumers.items() if stage == message.stage]
        self._wake(message.stage, consumers)
        return True

    def consume(self, stage: str, handler: Handler, *, concurrency: int) -> None:
        """Start handling the stage's messages on the running loop."""
        consumer = _Consumer(handler, Slots(concurrency), asyncio.get_running_loop())
        with self._lock:
            if stage in self._consumers:
                raise Misconfigured(f"stage {stage!r} has a consumer already")
            self._consumers[stage] = consumer
        self._wake(stage, [consumer])

    def healthy(self) -> bool:
        """True until it is closed: there is no broker that could be down."""
        return not self._closed

    def pending(self, stage: str) -> int | None:
        """Messages in the stage's backlog."""
        with self._lock:
            return len(self._backlog(stage))

    def self_message_age_s(self) -> float:
        """Zero: a consumer lives exactly as long as its loop, which the process watches itself."""
        return 0.0

    def stop_claiming(self) -> None:
        """Take no further messages; running handlers go on."""
        self._claiming = False

    async def drain(self) -> None:
        """Stop claiming, cancel the running handlers and wait for them."""
        self.stop_claiming()
        here = [c.handlers for c in self._consumers.values()]
        await asyncio.gather(*(handlers.cancel() for handlers in here))

    def close(self) -> None:
        """Refuse everything from now on."""
        with self._lock:
            self._claiming, self._closed = False, True
            self._consumers.clear()

    def _backlog(self, stage: str) -> Backlog:
        return self._backlogs.setdefault(stage, Backlog(self._capacity))

    def _wake(self, stage: str, consumers: Iterable[_Consumer]) -> None:
        for consumer in consumers:
            # A loop that has ended takes no calls; its messages wait like those of any dead worker.
            if not consumer.loop.is_closed():
                consumer.loop.call_soon_threadsafe(self._start_due, stage, consumer)

    def _start_due(self, stage: str, consumer: _Consumer) -> None:
        backlog = self._backlogs.get(stage)
        while self._claiming and backlog and (last := consumer.slots.accepts()) is not None:
            message = backlog.take(last)
            if message is None:
                return
            consumer.slots.hold(message.priority, len(message.item_ids))
            task = consumer.handlers.start(consumer.handler, message)
            task.add_done_callback(partial(self._go_on, stage, consumer, message))

    def _go_on(self, stage: str, consumer: _Consumer, message: Message, _: object) -> None:
        consumer.slots.release(message.priority, len(message.item_ids))
        self._start_due(stage, consumer)
