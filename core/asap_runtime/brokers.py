"""Which task queue belongs to a URL. The queues themselves do not know of each other."""

from __future__ import annotations

from urllib.parse import urlsplit

from asap.errors import Misconfigured
from asap_runtime.queue import MemoryQueue, TaskQueue

__all__ = ["open_queue"]


def open_queue(url: str) -> TaskQueue:
    """The queue for `memory://`, `redis://` or `rediss://`; nothing is connected yet."""
    scheme = urlsplit(url).scheme
    if scheme == "memory":
        return MemoryQueue()
    if scheme in ("redis", "rediss"):
        # Celery takes a third of a second to import, and the embedded process does without.
        from asap_runtime.celery_queue import CeleryQueue

        return CeleryQueue(url)
    raise Misconfigured(
        f"the queue's URL starts with memory://, redis:// or rediss://, not {scheme!r}"
    )
