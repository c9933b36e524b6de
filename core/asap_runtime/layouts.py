"""Records out: the three layouts, as JSONL, JSONL.gz or Parquet; files whole or not at all."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self, cast

from asap.errors import InvalidInput, NotFound
from asap.thinking import render_target
from asap.types import Record

__all__ = ["Format", "Layout", "RecordWriter", "in_chunks", "to_row"]

Layout = Literal["record", "messages", "triple"]
Format = Literal["jsonl", "parquet"]
CHUNK = 2**16
_GROUP_ROWS = 256
_GROUP_CHARACTERS = 2**24
"""Of a row group of Parquet, whichever comes first: what is in memory at a time."""


def to_row(record: Record, layout: Layout) -> dict[str, Any]:
    """One output row: the whole record, a chat for SFT, or a triple with the pruned CoT."""
    triple = record.triple
    if layout == "record":
        return record.model_dump(mode="json")
    if layout == "triple":
        fields = {"question": triple.question, "cot": record.pruned_cot, "answer": triple.answer}
        return {**triple.meta, "id": record.id, **fields}
    target = render_target(record.pruned_cot, triple.answer)
    turns = [("user", triple.question), ("assistant", target)]
    return {
        **triple.meta,
        "id": record.id,
        "messages": [{"role": role, "content": content} for role, content in turns],
    }


def in_chunks(records: Iterable[Record], layout: Layout, format: Format) -> Iterator[bytes]:
    """The records as a file that nobody seeks in, a piece at a time as they come."""
    pending = _Pending()
    sink = _Parquet(pending, layout) if format == "parquet" else _JsonLines(pending, layout)
    for record in records:
        sink.write(record)
        if pending.size >= CHUNK:
            yield pending.take()
    sink.close()
    if pending.size:
        yield pending.take()


class _Pending(io.RawIOBase):
    """Holds what was written until it is taken."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._position = self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._parts.append(bytes(data))
        self.size += len(data)
        self._position += len(data)
        return len(data)

    def tell(self) -> int:
        return self._position

    def take(self) -> bytes:
        data = b"".join(self._parts)
        self._parts, self.size = [], 0
        return data


class RecordWriter:
    """Writes records to a file by its ending (.jsonl, .jsonl.gz, .parquet); whole, or not at all.

    The file appears under its name when the `with` block ends without an exception. Parquet has
    fixed columns: other fields of the source are JSON in the column `meta`, and the `record` layout
    keeps the whole record as JSON in the column `record`, beside columns to query.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self._path, self._layout = path, layout
        self._part = path.with_name(f".{path.name}.part")
        self._sink: _JsonLines | _Parquet

    @staticmethod
    def check(path: Path) -> None:
        """Raise InvalidInput for an ending that cannot be written, or a folder that is not
        there.
        """
        if not path.name.lower().endswith((".jsonl", ".jsonl.gz", ".parquet")):
            raise InvalidInput(f"OUT must end in .jsonl, .jsonl.gz or .parquet, not {path.name!r}")
        if not path.parent.is_dir():
            raise NotFound(f"the folder {str(path.parent)!r} of OUT does not exist")
        if path.is_dir():
            raise InvalidInput(f"OUT is a folder: {str(path)!r}")

    def __enter__(self) -> Self:
        self.check(self._path)
        parquet = self._path.name.lower().endswith(".parquet")
        compressed = self._path.name.lower().endswith(".gz")
        self._raw = self._part.open("wb")
        if parquet:
            self._sink = _Parquet(self._raw, self._layout)
        elif compressed:  # no time stamp and no name in the header: equal records, equal bytes
            stream = gzip.GzipFile("", "wb", fileobj=self._raw, mtime=0)
            self._sink = _JsonLines(cast(IO[bytes], stream), self._layout)
        else:
            self._sink = _JsonLines(self._raw, self._layout)
        return self

    def write(self, record: Record) -> None:
        """Add one record."""
        self._sink.write(record)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._sink.close()
        self._raw.close()
        if kind is None:
            self._part.replace(self._path)
        else:
            with suppress(FileNotFoundError):
                self._part.unlink()


class _JsonLines:
    def __init__(self, stream: IO[bytes] | io.RawIOBase, layout: Layout) -> None:
        self._stream, self._layout = stream, layout

    def write(self, record: Record) -> None:
        line = json.dumps(to_row(record, self._layout), ensure_ascii=False) + "\n"
        self._stream.write(line.encode())

    def close(self) -> None:
        self._stream.close()


class _Parquet:
    def __init__(self, stream: IO[bytes] | io.RawIOBase, layout: Layout) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        turn = pa.struct([("role", pa.string()), ("content", pa.string())])
        text = [(name, pa.string()) for name in ("question", "cot", "answer")]
        columns: dict[Layout, list[tuple[str, Any]]] = {
            "messages": [("id", pa.string()), ("messages", pa.list_(turn)), ("meta", pa.string())],
            "triple": [("id", pa.string()), *text, ("meta", pa.string())],
            "record": [
                *((name, pa.string()) for name in ("id", "status", "question", "pruned_cot")),
                ("answer", pa.string()),
                ("kept_steps", pa.list_(pa.int32())),
                ("tokens_original", pa.int64()),
                ("tokens_pruned", pa.int64()),
                ("flags", pa.list_(pa.string())),
                ("record", pa.string()),
            ],
        }
        self._layout = layout
        self._rows: list[dict[str, Any]] = []
        self._table_of = partial(pa.Table.from_pylist, schema=pa.schema(columns[layout]))
        self._writer = pq.ParquetWriter(stream, pa.schema(columns[layout]))
        self._characters = 0

    def write(self, record: Record) -> None:
        if self._layout == "record":
            self._rows.append(_record_columns(record))
        else:
            plain = record.triple.model_copy(update={"meta": {}})
            row = to_row(record.model_copy(update={"triple": plain}), self._layout)
            self._rows.append({**row, "meta": json.dumps(record.triple.meta)})
        triple = record.triple
        self._characters += len(triple.question) + len(triple.cot) + len(triple.answer)
        if len(self._rows) >= _GROUP_ROWS or self._characters >= _GROUP_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(self._table_of(self._rows))
        self._rows, self._characters = [], 0

    def close(self) -> None:
        self._flush()
        self._writer.close()


def _record_columns(record: Record) -> dict[str, Any]:
    return {
        "id": record.id,
        "status": record.status,
        "question": record.triple.question,
        "pruned_cot": record.pruned_cot,
        "answer": record.triple.answer,
        "kept_steps": record.kept_steps,
        "tokens_original": record.tokens.original if record.tokens else None,
        "tokens_pruned": record.tokens.pruned if record.tokens else None,
        "flags": record.flags,
        "record": record.model_dump_json(),
    }
