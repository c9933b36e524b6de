"""JSON lines, plain or compressed, from a stream: one bad line at a time, in bounded memory."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

from asap.errors import AsapError, InvalidInput
from asap_runtime.strict_json import parse_json

__all__ = ["Line", "ReadLimits", "read_json_lines"]

RATIO_COUNTS_FROM = 64 * 2**20
"""Expanded bytes before the ratio counts: short text that repeats itself is no attack."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a data set: its number, counted from 1, and its object or what is wrong with
    it.
    """

    number: int
    row: Mapping[str, Any] | None
    error: AsapError | None = None
    fatal: bool = False
    """Nothing after this line can be read."""


@dataclass(frozen=True, slots=True)
class ReadLimits:
    """What a reader takes. The limits on expanding are for files of strangers."""

    line_bytes: int = 4 * 2**20
    expanded_ratio: float = math.inf
    """Expanded bytes of a compressed file, per byte read."""
    expanded_bytes: float = math.inf


def read_json_lines(
    stream: IO[bytes], limits: ReadLimits, *, compressed: bool = False, after: int = 0
) -> Iterator[Line]:
    """The lines of the stream, which is closed at the end; blank ones only count.

    Lines up to number `after` are passed over without a look at them.
    """
    with stream:
        source = _Source(stream, compressed, limits)
        number = 0
        while True:
            number += 1
            try:
                raw = source.line()
            except InvalidInput as error:
                yield Line(number, None, error, fatal=True)
                return
            if raw == b"":
                return
            if number > after and (raw is None or not raw.isspace()):
                yield _too_long(number, limits) if raw is None else _parse(number, raw)


class _Source:
    """The lines of a stream as bytes, counted before and after expanding."""

    def __init__(self, stream: IO[bytes], compressed: bool, limits: ReadLimits) -> None:
        self._limits, self._stream, self._plain = limits, stream, stream
        self._read = self._expanded = 0
        if compressed:
            self._plain = gzip.GzipFile(fileobj=self, mode="rb")  # type: ignore[call-overload]
        self._compressed = compressed

    def read(self, size: int = -1) -> bytes:
        """What the decompressor asks for."""
        data = self._stream.read(size)
        self._read += len(data)
        return data

    def line(self) -> bytes | None:
        """The next line; None for one that is too long, which has been passed over; b"" at the
        end. Raises InvalidInput when the stream is broken or expands beyond the limits.
        """
        longest = self._limits.line_bytes + 1
        raw = self._piece(longest)
        if len(raw) < longest or raw.endswith(b"\n"):
            return raw
        while raw and not raw.endswith(b"\n"):
            raw = self._piece(longest)
        return None

    def _piece(self, longest: int) -> bytes:
        try:
            raw = self._plain.readline(longest)
        except (OSError, EOFError, zlib.error) as error:
            raise InvalidInput(f"the file is broken here: {error}") from error
        self._expanded += len(raw)
        most = self._limits.expanded_bytes
        if self._compressed:
            most = min(most, max(self._limits.expanded_ratio * self._read, RATIO_COUNTS_FROM))
        if self._expanded > most:
            raise InvalidInput(
                f"the file expands too far: at most {self._limits.expanded_ratio:g} times its size "
                f"and {self._limits.expanded_bytes:,.0f} bytes are read",
                code="decompression-limit",
            )
        return raw


def _parse(number: int, raw: bytes) -> Line:
    try:
        row = parse_json(raw)
    except InvalidInput as error:
        return Line(number, None, error)
    if isinstance(row, dict):
        return Line(number, row)
    return Line(number, None, InvalidInput(f"expected a JSON object, found {type(row).__name__}"))


def _too_long(number: int, limits: ReadLimits) -> Line:
    detail = f"the line is longer than {limits.line_bytes:,} bytes"
    return Line(number, None, InvalidInput(detail, code="payload-too-large"))
