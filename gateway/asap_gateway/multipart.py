"""A multipart upload, parsed as it comes: its file goes to the blob store, never all in memory."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Literal

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from asap.errors import InvalidInput
from asap_runtime.blobs import BlobStore, BlobWriter
from asap_runtime.datasets import ENDINGS, ending_of

__all__ = ["Upload", "receive"]

WRITE_BYTES = 2**20
MAX_OPTIONS_BYTES = 10_000
MAX_HEADERS = 8
MAX_HEADER_BYTES = 1024
"""Of one part; a browser sends three short ones."""

Event = tuple[Literal["part", "data", "end"], bytes]
"""A part begins, with its Content-Disposition; bytes of it; it ends."""


@dataclass(frozen=True, slots=True)
class Upload:
    """A file that has come whole, and the options that came with it, not looked at yet."""

    key: str
    ending: str
    sha256: str
    options: bytes


async def receive(request: Request, blobs: BlobStore, tenant: str) -> Upload:
    """Store the file of a multipart request. Nothing is left in the store when this raises.

    Raises InvalidInput for a body that is no such form; ClientDisconnect when it ends half-way.
    """
    form = _Form(blobs, tenant)
    parser = _parser(request)
    try:
        async for chunk in request.stream():
            await form.take(parser.feed(chunk))
        if not parser.ended:
            raise _broken("it ends before its last boundary")
        return form.upload()
    finally:
        await form.close()


def _parser(request: Request) -> _Parser:
    kind, parameters = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data" or request.headers.get("content-encoding"):
        raise InvalidInput(
            "a file is sent as multipart/form-data, not compressed in transfer",
            code="unsupported-media-type",
        )
    try:
        return _Parser(parameters[b"boundary"])
    except (KeyError, FormParserError):
        raise _broken("it has no boundary that can be used") from None


class _Parser:
    """The library's callbacks as events in order."""

    def __init__(self, boundary: bytes) -> None:
        self._events: list[Event] = []
        self._name = self._value = self._disposition = b""
        self.ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._on_name,
                "on_header_value": self._on_value,
                "on_header_end": self._on_header,
                "on_headers_finished": lambda: self._add("part", self._disposition),
                "on_part_data": lambda data, start, end: self._add("data", data[start:end]),
                "on_part_end": lambda: self._add("end", b""),
                "on_end": self._end,
            },
            max_header_count=MAX_HEADERS,
            max_header_size=MAX_HEADER_BYTES,
        )

    def feed(self, chunk: bytes) -> list[Event]:
        """What these bytes hold. Raises InvalidInput."""
        try:
            self._parser.write(chunk)
        except FormParserError:
            raise _broken("a part or its headers cannot be read") from None
        events, self._events = self._events, []
        return events

    def _add(self, kind: Literal["part", "data", "end"], data: bytes) -> None:
        self._events.append((kind, data))

    def _begin(self) -> None:
        self._name = self._value = self._disposition = b""

    def _on_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = self._value
        self._name = self._value = b""

    def _end(self) -> None:
        self.ended = True


class _Form:
    """The two fields of an upload, in any order, each once."""

    def __init__(self, blobs: BlobStore, tenant: str) -> None:
        self._blobs, self._tenant = blobs, tenant
        self._seen: set[str] = set()
        self._field = ""
        self._options, self._pending = bytearray(), bytearray()
        self._key = self._ending = ""
        self._writer: BlobWriter | None = None
        self._stored: Upload | None = None

    async def take(self, events: list[Event]) -> None:
        """Go on with what has come."""
        for kind, data in events:
            if kind == "part":
                await self._begin(data)
            elif kind == "data":
                self._add(data)
            elif self._field == "file":
                await self._finish()
        if len(self._pending) >= WRITE_BYTES:
            await self._write()

    def upload(self) -> Upload:
        """The file with its options, once all has come. From here on it is the caller's."""
        if self._stored is None:
            raise _wrong_field("file", "a file is missing")
        stored, self._stored = self._stored, None
        return replace(stored, options=bytes(self._options) or b"{}")

    async def close(self) -> None:
        """Delete what has been stored and not been handed over."""
        if self._writer is not None:
            await asyncio.to_thread(self._writer.discard)
        if self._stored is not None:
            await asyncio.to_thread(self._blobs.delete, self._stored.key)

    async def _begin(self, disposition: bytes) -> None:
        _, parameters = parse_options_header(disposition)
        self._field = parameters.get(b"name", b"").decode(errors="replace")
        if self._field not in ("file", "options"):
            raise _wrong_field(self._field[:64], "there is no such field")
        if self._field in self._seen:
            raise _wrong_field(self._field, "the field stands twice")
        self._seen.add(self._field)
        if self._field == "file":
            name = parameters.get(b"filename", b"").decode(errors="replace")
            ending = ending_of(name)
            if ending is None:
                raise InvalidInput(
                    f"the file's name must end in one of {', '.join(ENDINGS)}",
                    code="unsupported-media-type",
                )
            self._key, self._ending = self._blobs.upload_key(self._tenant, ending), ending
            self._writer = await asyncio.to_thread(self._blobs.create, self._key)

    def _add(self, data: bytes) -> None:
        if self._field == "file":
            self._pending += data
            return
        self._options += data
        if len(self._options) > MAX_OPTIONS_BYTES:
            raise _wrong_field("options", f"at most {MAX_OPTIONS_BYTES:,} bytes are taken")

    async def _write(self) -> None:
        assert self._writer is not None
        data, self._pending = bytes(self._pending), bytearray()
        await asyncio.to_thread(self._writer.write, data)

    async def _finish(self) -> None:
        await self._write()
        assert self._writer is not None
        writer, self._writer = self._writer, None
        await asyncio.to_thread(writer.commit)
        self._stored = Upload(self._key, self._ending, writer.sha256, b"")


def _broken(reason: str) -> InvalidInput:
    return InvalidInput(f"the form cannot be read: {reason}", code="malformed-json")


def _wrong_field(name: str, reason: str) -> InvalidInput:
    return InvalidInput(f"/{name}: {reason}", errors=[{"pointer": f"/{name}", "detail": reason}])
