"""The task queue over Celery and Redis: publishes from a thread, runs handlers on the asyncio loop.

One stage per process: Celery's worker state is global, and so is its number of threads. Each of
them takes one message, hands it to the loop and waits; the loop does the work.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import socket
import threading
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field

import structlog
from celery import Celery  # type: ignore[import-untyped]
from celery.exceptions import Reject  # type: ignore[import-untyped]
from celery.utils.nodenames import worker_direct  # type: ignore[import-untyped]
from celery.worker import WorkController  # type: ignore[import-untyped]
from celery.worker import state as worker_state
from kombu import Connection, Producer  # type: ignore[import-untyped]
from kombu.exceptions import OperationalError  # type: ignore[import-untyped]

from asap.errors import InvalidInput, Misconfigured
from asap_runtime.celery_worker import (
    ITEMS,
    QUEUE_PREFIX,
    RETRY_S,
    RUN,
    SELF,
    build_app,
    build_worker,
)
from asap_runtime.queue import (
    CAPACITY,
    DRAIN_S,
    Backlog,
    Handler,
    Handlers,
    Message,
    Slots,
)

__all__ = ["CeleryQueue"]

LOOK_S = 1.0
"""Between looks at the broker: ping, queue lengths."""
SELF_MESSAGE_S = 10.0
SELF_MESSAGE_EXPIRES_S = 20.0
FLUSH_S = 1.0
"""How long `close` waits for messages that are still in this process."""

_log = structlog.get_logger(__name__)


class CeleryQueue:
    """The queue of a cluster. Threads start with the first use, nothing is connected before."""

    def __init__(self, url: str, *, capacity: int = CAPACITY) -> None:
        self.discarded: Counter[str] = Counter()
        """Messages that could not be understood, by reason."""
        self._app = build_app(url, self._discard)
        # Unless told otherwise, Celery shares tasks between all applications of a process.
        self._app.task(self._run, name=RUN, shared=False)
        self._app.task(self._answer, name=SELF, shared=False)
        self._broker = _Broker(self._app, Backlog(capacity))
        self._consumer: _Consumer | None = None

    def publish(self, message: Message) -> bool:
        """Leave the message to the publisher thread; False when that is full or has no broker."""
        return self._broker.offer(message)

    def consume(self, stage: str, handler: Handler, *, concurrency: int) -> None:
        """Start a worker for the stage in a thread; its handlers run on the running loop."""
        if self._consumer is not None:
            raise Misconfigured("over Redis, a process consumes one stage: start one for each")
        hostname = f"{stage}-{uuid.uuid4().hex[:12]}@{socket.gethostname()}"
        self._consumer = _Consumer(stage, handler, Slots(concurrency), hostname)
        self._broker.direct = worker_direct(hostname)
        self._broker.start()
        self._consumer.thread = threading.Thread(
            target=self._work, args=(self._consumer,), name="celery-worker", daemon=True
        )
        self._consumer.thread.start()

    def healthy(self) -> bool:
        """The broker answered the last look."""
        self._broker.start()
        return self._broker.up is True

    def pending(self, stage: str) -> int | None:
        """Messages waiting in Redis at the last look, and those sent since; the first call only
        starts looking.
        """
        self._broker.start()
        self._broker.stages.add(stage)
        return self._broker.sizes.get(stage) if self._broker.up else None

    def self_message_age_s(self) -> float:
        """Seconds since a message of ours to ourselves came back through Redis, worker and loop.

        Zero while every thread works: then no message can come, and nothing is wrong.
        """
        consumer = self._consumer
        if consumer is None or consumer.slots.accepts() is None:
            return 0.0
        return time.monotonic() - consumer.seen_at

    def stop_claiming(self) -> None:
        """Take no further messages; running handlers go on."""
        consumer = self._consumer
        if consumer is None or not consumer.claiming:
            return
        consumer.claiming = False
        if (worker := consumer.worker) is not None:
            worker.consumer.call_soon(
                worker.consumer.cancel_task_queue, QUEUE_PREFIX + consumer.stage
            )

    async def drain(self) -> None:
        """Stop claiming, cancel the running handlers, return their messages, end the worker."""
        self.stop_claiming()
        if (consumer := self._consumer) is None:
            return
        worker_state.should_stop = 0
        if consumer.worker is not None:
            consumer.worker.consumer.wake()
        for future in tuple(consumer.futures):
            future.cancel()
        await consumer.handlers.cancel()
        await asyncio.to_thread(consumer.thread.join, DRAIN_S)

    def close(self) -> None:
        """Send what is left within a second, then give the connection back."""
        self._broker.close()

    def _work(self, consumer: _Consumer) -> None:
        """Body of the worker's thread: a worker that ends unasked is replaced."""
        while consumer.claiming:
            worker_state.should_stop = None
            worker = build_worker(
                self._app,
                stage=consumer.stage,
                slots=consumer.slots,
                hostname=consumer.hostname,
            )
            consumer.worker = worker
            if not consumer.claiming:
                # `stop_claiming` came too early to see this worker.
                return
            worker.start()
            if consumer.claiming:
                _log.error("worker.ended", exit_code=worker.exitcode)
                time.sleep(RETRY_S)

    def _run(self, **fields: object) -> None:
        """Body of the task `RUN`, in a thread of the pool."""
        consumer = self._consumer
        assert consumer is not None
        try:
            message = Message.from_wire(fields)
            if message.stage != consumer.stage:
                raise InvalidInput("the message belongs to another stage's queue")
        except InvalidInput:
            self._discard("bad-message")
            return
        future = asyncio.run_coroutine_threadsafe(_handle(consumer, message), consumer.loop)
        consumer.futures.add(future)
        try:
            future.result()
        except concurrent.futures.CancelledError:
            # Back to the queue's head: another process goes on at once.
            raise Reject(requeue=True) from None
        finally:
            consumer.futures.discard(future)

    def _answer(self) -> None:
        """Body of the task `SELF`: seen when the loop turns, too."""
        if (consumer := self._consumer) is not None:
            consumer.loop.call_soon_threadsafe(consumer.see)

    def _discard(self, reason: str) -> None:
        self.discarded[reason] += 1
        _log.warning("message.discarded", reason=reason)


@dataclass(slots=True, eq=False)
class _Consumer:
    """The one consumed stage of this process."""

    stage: str
    handler: Handler
    slots: Slots
    hostname: str
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    handlers: Handlers = field(default_factory=Handlers)
    futures: set[concurrent.futures.Future[None]] = field(default_factory=set)
    thread: threading.Thread = field(default_factory=threading.Thread)
    worker: WorkController | None = None
    claiming: bool = True
    seen_at: float = field(default_factory=time.monotonic)

    def see(self) -> None:
        """Note that a message came through."""
        self.seen_at = time.monotonic()


async def _handle(consumer: _Consumer, message: Message) -> None:
    consumer.see()
    if not consumer.claiming:
        raise asyncio.CancelledError
    task = consumer.handlers.start(consumer.handler, message)
    await task
    consumer.see()


class _Broker:
    """The thread that talks to Redis for everybody who must not wait for it."""

    def __init__(self, app: Celery, backlog: Backlog) -> None:
        self.up: bool | None = None
        """None until the first answer or failure."""
        self.direct: object | None = None
        """The queue to which this process sends messages to itself."""
        self.stages: set[str] = set()
        self.sizes: dict[str, int] = {}
        self._app, self._backlog = app, backlog
        self._held: Message | None = None
        self._arrived = threading.Event()
        self._closed = False
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._self_message_at = 0.0

    def start(self) -> None:
        """Start the thread, once."""
        with self._lock:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._live, name="publisher", daemon=True)
                self._thread.start()

    def offer(self, message: Message) -> bool:
        """Take a message if there is room and no reason to think that the broker is down."""
        self.start()
        if self._closed or self.up is False or not self._backlog.offer(message):
            return False
        self._arrived.set()
        return True

    def close(self) -> None:
        """End the thread, after the messages it still holds if the broker is up."""
        self._closed = True
        self._arrived.set()
        if self._thread is not None:
            self._thread.join(FLUSH_S)

    def _live(self) -> None:
        while True:  # once at least: who closes at once has left messages, too
            connection = self._app.connection_for_write()
            errors = (
                *connection.connection_errors, *connection.channel_errors, OperationalError,
            )  # fmt: skip
            try:
                self._serve(connection)
            except errors as error:
                if self.up is not False:
                    _log.warning("broker.lost", error=type(error).__name__)
                self.up = False
            except Exception:
                _log.exception("publisher.failed")
                self.up = False
            finally:
                connection.release()
            if self._closed:
                return
            time.sleep(RETRY_S / 2)

    def _serve(self, connection: Connection) -> None:
        channel = connection.channel()
        producer = Producer(channel, auto_declare=False)
        look_at = 0.0
        while True:
            now = time.monotonic()
            if now >= look_at:
                self._look(channel, producer)
                look_at = now + LOOK_S
            # A message is held until it was sent: one that met an outage goes first afterwards.
            self._held = self._held or self._backlog.take()
            if self._held is not None:
                self._send(producer, self._held)
                self._held = None
            elif self._closed:
                return
            elif self._arrived.wait(max(0.0, look_at - time.monotonic())):
                self._arrived.clear()

    def _send(self, producer: Producer, message: Message) -> None:
        self._app.send_task(
            RUN,
            kwargs=message.to_wire(),
            queue=QUEUE_PREFIX + message.stage,
            priority=message.priority,
            headers={ITEMS: len(message.item_ids)},
            producer=producer,
            # Otherwise every message carries its arguments a second time, as text for logs.
            argsrepr="",
            kwargsrepr="",
        )
        if message.stage in self.stages:
            self.sizes[message.stage] = self.sizes.get(message.stage, 0) + 1

    def _look(self, channel: object, producer: Producer) -> None:
        """Ask what `healthy` and `pending` say until the next look; write to ourselves."""
        channel.client.ping()  # type: ignore[attr-defined]
        for stage in tuple(self.stages):
            self.sizes[stage] = channel._size(QUEUE_PREFIX + stage)  # type: ignore[attr-defined]
        self.up = True
        now = time.monotonic()
        if self.direct is not None and now >= self._self_message_at + SELF_MESSAGE_S:
            self._self_message_at = now
            self._app.send_task(
                SELF, queue=self.direct, expires=SELF_MESSAGE_EXPIRES_S, producer=producer
            )
            # A killed worker's queue must not stay behind: its name never comes again.
            channel.client.expire(self.direct.name, 60)  # type: ignore[attr-defined]
