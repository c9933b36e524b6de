"""Server-sent events from bytes. It knows neither HTTP nor what the events mean."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

__all__ = ["ServerEvent", "parse_events"]

# A carriage return at the end may be half of a line's end: it waits for what follows.
_LINE_END = re.compile(rb"\r\n|\n|\r(?!\Z)")


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One dispatched event. `id` is the last one the stream has named, None before the first."""

    name: str
    data: str
    id: str | None


def parse_events(chunks: Iterable[bytes]) -> Iterator[ServerEvent]:
    """Events as their blank lines come; one that the stream's end cuts off is dropped."""
    name, data, last_id = "", list[str](), None
    for line in _lines(chunks):
        if not line:
            if data:
                yield ServerEvent(name or "message", "\n".join(data), last_id)
            name, data = "", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "data":
            data.append(value)
        elif field == "id" and "\0" not in value:
            last_id = value


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    pending = b""
    for chunk in chunks:
        *lines, pending = _LINE_END.split(pending + chunk)
        for line in lines:
            yield line.decode(errors="replace")
