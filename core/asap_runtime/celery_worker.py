"""Celery as we run it: our settings, and a worker in a thread that outlives garbage and outages.

The worker's pool is threads and its event loop (the hub) is Celery's own; coroutines never run
here. Where a class below overrides one of the pinned versions, its first line
says what would happen without it.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import Empty
from typing import Any

import structlog
from celery import Celery  # type: ignore[import-untyped]
from celery.utils.log import get_logger  # type: ignore[import-untyped]
from celery.worker import WorkController  # type: ignore[import-untyped]
from celery.worker import consumer as celery_consumer
from celery.worker.state import maybe_shutdown  # type: ignore[import-untyped]
from kombu import Connection  # type: ignore[import-untyped]
from kombu.asynchronous import set_event_loop  # type: ignore[import-untyped]
from kombu.transport import redis, virtual  # type: ignore[import-untyped]

from asap_runtime.queue import LIVE, MAX_ITEMS, Slots

__all__ = [
    "ITEMS",
    "QUEUE_PREFIX",
    "RETRY_S",
    "RUN",
    "SELF",
    "Consumer",
    "build_app",
    "build_worker",
]

QUEUE_PREFIX = "asap."
RUN = "asap.run"
"""The task that hands a message to a stage's handler."""
SELF = "asap.self"
"""The task by which a worker shows itself that messages arrive."""
ITEMS = "asap_items"
"""The header that says how many items a message names."""
LIVE_ONLY_S = 0.05
"""How long a fetch that leaves batch messages alone may wait; then there may be room for them."""
RETRY_S = 1.0
"""Between attempts to reach a broker that is down."""

_log = structlog.get_logger(__name__)


def build_app(url: str, discard: Callable[[str], None]) -> Celery:
    """The Celery application; nothing is connected yet.

    Args:
        url: `redis://` or `rediss://`, with one database that holds nothing but the broker.
        discard: called with a reason for each message that cannot be understood.
    """
    app = Celery("asap", broker=url, set_as_current=False)
    app.conf.update(
        result_backend=None,
        task_ignore_result=True,
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_publish_retry=False,
        accept_content=["json"],
        task_serializer="json",
        worker_prefetch_multiplier=1,
        # Late acknowledgement lets the prefetch counter drift; with this, messages stay in Redis
        # until a thread is free.
        worker_disable_prefetch=True,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_direct=True,
        worker_consumer=Consumer,
        # Threads cannot be killed: the fence drops what they write too late.
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_enable_prefetch_count_reduction=False,
        broker_connection_max_retries=None,
        broker_connection_retry_on_startup=True,
        broker_transport=f"{__name__}:Transport",
        broker_transport_options={
            "visibility_timeout": 3600,
            "socket_connect_timeout": 1,
            "socket_timeout": 5,
            "socket_keepalive": True,
            "queue_order_strategy": "priority",
            "priority_steps": [0, 5, 9],
            "discard": discard,
        },
    )
    if url.startswith("rediss://"):
        # Without this, kombu speaks plain text to a rediss:// URL that has no ssl_ options.
        app.conf.broker_use_ssl = {"ssl_cert_reqs": ssl.CERT_REQUIRED}
    return app


def build_worker(app: Celery, *, stage: str, slots: Slots, hostname: str) -> WorkController:
    """A worker for one stage's queue and its own direct queue; `start()` blocks until it ends."""
    app.conf.broker_transport_options["slots"] = slots
    # Globals: threads of the pool look their task up in the default application, and the hub of a
    # worker that ended is closed.
    app.set_default()
    set_event_loop(None)
    return app.WorkController(
        app=app,
        hostname=hostname,
        pool="threads",
        concurrency=slots.most,
        queues=[QUEUE_PREFIX + stage],
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
    )


class Message(virtual.Message):  # type: ignore[misc]
    """Says when it cannot be acknowledged; kombu would only log that, and the worker stand idle.

    With all threads busy, nothing else uses the connection: its loss would never be noticed, and
    the messages that stay unacknowledged count as running for ever. What a lost connection had
    delivered is not acknowledged at all: it comes again, and finds its rows finished.
    """

    release: Callable[[], None] | None = None
    """Gives the slot of the message back, once."""

    def ack_log_error(self, logger: object, errors: object, multiple: bool = False) -> None:
        """Acknowledge, or raise to make the consumer connect again."""
        self._leave()
        if not self.channel.closed:
            self.ack(multiple)

    def reject_log_error(self, logger: object, errors: object, requeue: bool = False) -> None:
        """Reject, or raise to make the consumer connect again."""
        self._leave()
        if not self.channel.closed:
            self.reject(requeue)

    def hold(self, slots: Slots) -> None:
        """Take a slot, from the moment of delivery on: before the next fetch."""
        items = self.headers.get(ITEMS)
        size = items if type(items) is int and 1 <= items <= MAX_ITEMS else MAX_ITEMS
        taken = (self.properties.get("priority"), size)
        slots.hold(*taken)
        self.release = partial(slots.release, *taken)

    def _leave(self) -> None:
        if self.release is not None:
            self.release()
            self.release = None


class QoS(redis.QoS):  # type: ignore[misc]
    """Gives unacknowledged messages back; one that is no JSON would keep workers from starting."""

    def restore_by_tag(self, tag: object, client: object = None, leftmost: bool = False) -> None:
        """Give one message back, or forget it."""
        try:
            super().restore_by_tag(tag, client, leftmost)
        except (TypeError, ValueError):
            self._remove_from_indices(tag).execute()
            self.channel.connection.client.transport_options["discard"]("unreadable-unacked")


class Channel(redis.Channel):  # type: ignore[misc]
    """Reads from Redis; what is no JSON would end the worker in kombu's own channel.

    There, too, batch messages would take all threads, and a live one wait until one of them ends.
    """

    Message = Message
    QoS = QoS

    priority_steps: list[int]

    def _brpop_start(self, timeout: float | None = None) -> None:
        if self.connection.client.transport_options["slots"].accepts() != LIVE:
            super()._brpop_start(timeout)
            return
        every = self.priority_steps
        self.priority_steps = every[:1]
        try:
            super()._brpop_start(LIVE_ONLY_S)
        finally:
            self.priority_steps = every

    def _brpop_read(self, **options: object) -> bool:
        try:
            return bool(super()._brpop_read(**options))
        except ValueError:
            self.connection.client.transport_options["discard"]("no-json")
            raise Empty from None


class Transport(redis.Transport):  # type: ignore[misc]
    """Delivers messages; JSON that is no envelope would end the worker in kombu's own transport."""

    Channel = Channel

    def _deliver(self, message: object, queue: str) -> None:
        try:
            super()._deliver(message, queue)
        except (AttributeError, KeyError, TypeError, ValueError):
            self.client.transport_options["discard"]("no-envelope")


class Consumer(celery_consumer.Consumer):  # type: ignore[misc]
    """Celery's consumer, awake at once, patient with a broker that is down, deaf to strangers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._bell, self._ringer = socket.socketpair()
        self._bell.setblocking(False)
        self._ringer.setblocking(False)
        super().__init__(*args, **kwargs)

    def wake(self) -> None:
        """End the hub's current wait, from any thread."""
        # A full pipe wakes as well; a closed one belongs to a worker that has ended.
        with suppress(OSError):
            self._ringer.send(b"!")

    def call_soon(self, callback: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the callback on the hub; threads acknowledge this way when they become free.

        The hub is not woken by Celery itself: it would poll on for up to a second, idle threads or
        not.
        """
        promised = super().call_soon(callback, *args, **kwargs)
        self.wake()
        return promised

    def register_with_event_loop(self, hub: Any) -> None:
        """Listen to `wake`."""
        super().register_with_event_loop(hub)
        hub.add_reader(self._bell, self._silence)

    def ensure_connected(self, connection: Connection) -> Connection:
        """Connect, for ever, once a second; Celery's own pauses grow to half a minute."""

        def failed(error: Exception, _: float) -> None:
            _log.warning("broker.unreachable", error=type(error).__name__)

        connection = connection.ensure_connection(
            failed,
            interval_start=RETRY_S,
            interval_step=0,
            interval_max=RETRY_S,
            callback=maybe_shutdown,
        )
        self.first_connection_attempt = False
        return connection

    def create_task_handler(self) -> Callable[[Any], None]:
        """Celery's handler for our tasks only; it would end the worker on half-made envelopes."""
        handle = super().create_task_handler()
        options = self.app.conf.broker_transport_options

        def accept(message: Any) -> None:
            try:
                # Nothing of ours has a time to wait for; such a message would occupy the worker.
                if message.headers["task"] in (RUN, SELF) and not message.headers.get("eta"):
                    message.hold(options["slots"])
                    handle(message)
                    return
                reason = "unknown-task"
            except self.connection_errors:
                raise
            except Exception:
                reason = "bad-headers"
            options["discard"](reason)
            message.ack_log_error(get_logger(__name__), self.connection_errors)

        return accept

    def shutdown(self) -> None:
        """Give the connection and the bell back."""
        super().shutdown()
        self._bell.close()
        self._ringer.close()

    def _silence(self) -> None:
        with suppress(BlockingIOError):
            self._bell.recv(4096)
