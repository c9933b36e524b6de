"""Data sets in and out, streamed: JSONL, JSONL.gz, Parquet and Hugging Face names to triples and
back.

Reading never stops at a bad line: it becomes a `Line` with an error that names the line, and the
next one is read. Memory is one line, or one Parquet batch.
"""

from __future__ import annotations

import gzip
import io
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

from asap.errors import AsapError, InvalidInput, NotFound
from asap.thinking import render_target
from asap.types import Record
from pydantic import ValidationError

__all__ = [
    "Layout",
    "Line",
    "RecordWriter",
    "count_lines",
    "read_lines",
    "read_records",
    "to_row",
]

Layout = Literal["record", "messages", "triple"]
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_PARQUET_ROWS = 256


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a data set: its number, counted from 1, and its object or what is wrong with
    it.
    """

    number: int
    row: Mapping[str, Any] | None
    error: AsapError | None = None


def read_lines(source: str) -> Iterator[Line]:
    """The lines of a file (.jsonl, .jsonl.gz, .parquet), a data set directory or a hub name.

    A hub name is `owner/name` or `owner/name:split` (default split: train). Raises NotFound or
    InvalidInput before the first line when the source cannot be read at all.
    """
    path = Path(source)
    if path.is_file():
        return _open_file(path)
    name, _, split = source.partition(":")
    if Path(name).is_dir() or (_HUB_NAME.fullmatch(name) and not path.suffix):
        return _from_hub(name, split or "train")
    raise NotFound(f"there is no file {source!r} (and it is no data set name such as 'owner/name')")


def _open_file(path: Path) -> Iterator[Line]:
    name = path.name.lower()
    try:
        if name.endswith(".parquet"):
            return _from_parquet(path)
        if name.endswith((".jsonl.gz", ".ndjson.gz")):
            return _from_json_lines(gzip.open(path, "rb"), path)
        if name.endswith((".jsonl", ".ndjson")):
            return _from_json_lines(path.open("rb"), path)
    except OSError as error:
        raise NotFound(f"{str(path)!r} cannot be read: {error.strerror}") from error
    raise InvalidInput(
        f"{str(path)!r} has an unknown ending; known are .jsonl, .jsonl.gz, .ndjson and .parquet"
    )


def _from_json_lines(stream: IO[bytes] | gzip.GzipFile, path: Path) -> Iterator[Line]:
    with stream:
        number = 0
        while True:
            number += 1
            try:
                raw = stream.readline()
            except (OSError, EOFError) as error:
                yield Line(number, None, InvalidInput(f"{path.name!r} is broken here: {error}"))
                return
            if not raw:
                return
            if raw.strip():
                yield _parse(number, raw)


def _parse(number: int, raw: bytes) -> Line:
    try:
        row = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        problem = InvalidInput(f"not UTF-8 at byte {error.start}", code="invalid-utf8")
    except RecursionError:
        problem = InvalidInput("JSON nested too deeply", code="malformed-json")
    except json.JSONDecodeError as error:
        problem = InvalidInput(
            f"not JSON at column {error.colno}: {error.msg}", code="malformed-json"
        )
    except ValueError as error:
        problem = InvalidInput(f"not JSON: {error}", code="malformed-json")
    else:
        if isinstance(row, dict):
            return Line(number, row)
        problem = InvalidInput(f"expected a JSON object, found {type(row).__name__}")
    return Line(number, None, problem)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _from_parquet(path: Path) -> Iterator[Line]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidInput(f"{str(path)!r} is no readable Parquet file: {reason}") from error

    def lines() -> Iterator[Line]:
        number = 0
        with file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield Line(number, row)

    return lines()


def _from_hub(name: str, split: str) -> Iterator[Line]:
    try:
        import datasets
    except ImportError as error:
        raise NotFound(f"reading {name!r} needs the extra 'hub' (package datasets)") from error
    try:
        rows = datasets.load_dataset(name, split=split, streaming=True)
    except (
        Exception
    ) as error:  # the library raises its own, the hub client's and network errors alike
        reason = str(error).strip().splitlines()[0]
        raise NotFound(f"data set {name!r} (split {split!r}) cannot be loaded: {reason}") from error
    return (Line(number, row) for number, row in enumerate(rows, start=1))


def count_lines(source: str) -> int | None:
    """Number of lines of a file, to show how far a run is; None when it is not known cheaply."""
    path = Path(source)
    if not path.is_file():
        return None
    if path.name.lower().endswith(".parquet"):
        import pyarrow.parquet as pq

        return int(pq.read_metadata(path).num_rows)
    with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as stream:
        return sum(1 for line in stream if line.strip())


def read_records(source: str) -> Iterator[Record]:
    """The records of a file written in the `record` layout. Raises InvalidInput at the first other
    line.
    """
    for line in read_lines(source):
        if line.error is not None:
            raise InvalidInput(f"line {line.number}: {line.error.detail}", line=line.number)
        row = line.row or {}
        try:
            if isinstance(row.get("record"), str):
                yield Record.model_validate_json(row["record"])
            else:
                yield Record.model_validate(row)
        except ValidationError as error:
            raise InvalidInput(
                f"line {line.number} of {source!r} is no record of `asap prune` (layout 'record')",
                line=line.number,
            ) from error


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


class RecordWriter:
    """Writes records to a file by its ending (.jsonl, .jsonl.gz, .parquet); whole, or not at all.

    The file appears under its name when the `with` block ends without an exception. In Parquet the
    `record` layout keeps the whole record as JSON in the column `record`, beside columns to query.
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
        self._sink = _Parquet(self._part) if parquet else _JsonLines(self._part, compressed)
        return self

    def write(self, record: Record) -> None:
        """Add one record."""
        row = to_row(record, self._layout)
        if self._layout == "record" and isinstance(self._sink, _Parquet):
            row = _record_columns(record)
        self._sink.write(row)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._sink.close()
        if kind is None:
            self._part.replace(self._path)
        else:
            with suppress(FileNotFoundError):
                self._part.unlink()


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


class _JsonLines:
    def __init__(self, path: Path, compressed: bool) -> None:
        self._raw = path.open("wb")
        # no time stamp and no file name in the header: equal records give equal bytes
        self._binary: IO[bytes] = (
            gzip.GzipFile("", "wb", fileobj=self._raw, mtime=0)  # type: ignore[assignment]
            if compressed
            else self._raw
        )
        self._text = io.TextIOWrapper(self._binary, encoding="utf-8", newline="\n")

    def write(self, row: Mapping[str, Any]) -> None:
        self._text.write(json.dumps(row, ensure_ascii=False) + "\n")

    def close(self) -> None:
        self._text.close()
        self._raw.close()


class _Parquet:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[Mapping[str, Any]] = []
        self._writer: Any = None

    def write(self, row: Mapping[str, Any]) -> None:
        nested = {"messages", "kept_steps", "flags"}
        self._rows.append(
            {
                # columns of one type, whatever a line's other fields are
                name: value
                if name in nested or not isinstance(value, list | dict)
                else json.dumps(value)
                for name, value in row.items()
            }
        )
        if len(self._rows) >= _PARQUET_ROWS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._writer is None:
            table = pa.Table.from_pylist(self._rows)
            self._writer = pq.ParquetWriter(self._path, table.schema)
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._writer.schema))
        self._rows = []

    def close(self) -> None:
        self._flush()
        self._writer.close()
