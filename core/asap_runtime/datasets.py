"""Data sets in and out, streamed: JSONL, JSONL.gz, Parquet and Hugging Face names to triples and
back.

Reading never stops at a bad line: it becomes a `Line` with an error that names the line, and the
next one is read. Memory is one line, or one Parquet batch.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from asap.errors import InvalidInput, NotFound
from asap.types import Record
from asap_runtime.json_lines import Line, ReadLimits, read_json_lines

__all__ = [
    "ENDINGS",
    "Line",
    "count_lines",
    "ending_of",
    "read_lines",
    "read_records",
]

ENDINGS = (".jsonl.gz", ".ndjson.gz", ".jsonl", ".ndjson", ".parquet")
"""File names that tell a known format."""

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_PARQUET_ROWS = 256


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
    ending = ending_of(path.name)
    if ending is None:
        raise InvalidInput(
            f"{str(path)!r} has an unknown ending; known are .jsonl, .jsonl.gz, .ndjson and "
            ".parquet"
        )
    if ending == ".parquet":
        return _from_parquet(path)
    try:
        stream = path.open("rb")
    except OSError as error:
        raise NotFound(f"{str(path)!r} cannot be read: {error.strerror}") from error
    return read_json_lines(stream, ReadLimits(), compressed=ending.endswith(".gz"))


def ending_of(name: str) -> str | None:
    """The ending of a file name that tells a known format, lower case."""
    return next((ending for ending in ENDINGS if name.lower().endswith(ending)), None)


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
