"""Tokenised samples on disk, named by what they follow from: read lazily, recomputed when damaged.

A file is an Arrow file, mapped into memory, so that a sample costs none until it is looked at, and
behind it the SHA-256 of all its bytes. It is believed only when digest and key agree.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from asap.errors import NotFound
from asap.sft import IGNORED, SftExample

__all__ = ["Examples", "TokenCache", "TokenFile", "TokenRow", "key_of", "sha256_of"]

VERSION = 1
"""Of the file's columns."""
ROWS = 64
"""Samples in one record batch: what is in memory at a time while a file is written."""
DIGEST = hashlib.sha256().digest_size
STALE_S = 24 * 3600.0
"""Age of a part file that nobody writes any more."""
_KEY = b"asap_key"
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("tokens", pa.int32()),
        ("loss_tokens", pa.int32()),
        ("input_ids", pa.list_(pa.int32())),
        ("reason", pa.string()),
        ("text", pa.string()),
    ]
)


class TokenRow(NamedTuple):
    """One sample of a data file: its example, or why it is dropped."""

    id: str
    tokens: int
    """Of the whole sample, dropped or not."""
    example: SftExample | None
    reason: str | None = None
    text: str | None = None
    """The training text; of the first samples alone, to be shown."""


def key_of(facts: object) -> str:
    """The name of the file that follows from these facts, which JSON must know."""
    canonical = json.dumps([VERSION, facts], sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Of the bytes of a file, in hexadecimal. Raises NotFound."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise NotFound(f"{str(path)!r} cannot be read: {error.strerror}") from error


class TokenFile:
    """The rows of one data file, in its order. Figures are at hand; tokens are read when asked for.

    Raises ValueError when the file is not whole, or another key's.
    """

    def __init__(self, path: Path, key: str) -> None:
        with path.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size <= DIGEST:
                raise ValueError("the file is cut off")
            mapped = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
        body, digest = mapped[:-DIGEST], mapped[-DIGEST:]
        if hashlib.sha256(body).digest() != digest:
            raise ValueError("the file is damaged")
        reader = pa.ipc.open_file(pa.py_buffer(body))
        if (reader.schema.metadata or {}).get(_KEY) != key.encode():
            raise ValueError("the file is another key's")
        self._batches = [reader.get_batch(n) for n in range(reader.num_record_batches)]

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def ids(self) -> list[str]:
        """The samples' ids."""
        return list(self._all("id"))

    @cached_property
    def tokens(self) -> npt.NDArray[np.int32]:
        """Tokens of each sample."""
        return np.fromiter(self._all("tokens"), np.int32)

    @cached_property
    def loss_tokens(self) -> npt.NDArray[np.int32]:
        """Tokens of each sample that carry loss; 0 for a dropped one."""
        return np.fromiter(self._all("loss_tokens"), np.int32)

    @cached_property
    def reasons(self) -> list[str | None]:
        """Why each sample is dropped; None for one that stays."""
        return list(self._all("reason"))

    @cached_property
    def largest_id(self) -> int:
        """The largest id in it; -1 without any."""
        columns = (batch.column("input_ids").flatten() for batch in self._batches)
        largest = (pc.max(column).as_py() for column in columns)
        return max((one for one in largest if one is not None), default=-1)

    def text(self, index: int) -> str | None:
        """The training text, where it was kept."""
        text: str | None = self._cell("text", index).as_py()
        return text

    def example(self, index: int) -> SftExample:
        """The example of a sample that stays."""
        ids = tuple(self._cell("input_ids", index).values.to_numpy().tolist())
        masked = len(ids) - int(self.loss_tokens[index])
        return SftExample(self.ids[index], ids, (IGNORED,) * masked + ids[masked:])

    def _all(self, column: str) -> Iterator[Any]:
        for batch in self._batches:
            yield from batch.column(column).to_pylist()

    def _cell(self, column: str, index: int) -> Any:
        # every batch but the last holds ROWS rows
        return self._batches[index // ROWS].column(column)[index % ROWS]


class Examples(Sequence[SftExample]):
    """Samples of token files, read when asked for; ids and lengths are at hand."""

    def __init__(self, places: Sequence[tuple[TokenFile, int]]) -> None:
        self._places = tuple(places)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> SftExample: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> SftExample | Examples:
        if isinstance(index, slice):
            return Examples(self._places[index])
        file, row = self._places[index]
        return file.example(row)

    @cached_property
    def ids(self) -> list[str]:
        """The samples' ids."""
        return [file.ids[row] for file, row in self._places]

    @cached_property
    def tokens(self) -> npt.NDArray[np.int32]:
        """Tokens of each sample."""
        return np.fromiter((file.tokens[row] for file, row in self._places), np.int32)

    @cached_property
    def loss_tokens(self) -> npt.NDArray[np.int32]:
        """Tokens of each sample that carry loss."""
        return np.fromiter((file.loss_tokens[row] for file, row in self._places), np.int32)

    @property
    def largest_id(self) -> int:
        """The largest id in their files; -1 without any."""
        files = {id(file): file for file, _ in self._places}
        return max((file.largest_id for file in files.values()), default=-1)

    def text(self, index: int) -> str | None:
        """The training text; kept for the first samples of a file alone."""
        file, row = self._places[index]
        return file.text(row)


class TokenCache:
    """A folder of token files. Several processes may share it: a file appears whole or not at all.

    Nothing is ever deleted but what a killed process left half-written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: str) -> TokenFile | None:
        """The file of this key; None when there is none that can be believed."""
        try:
            return TokenFile(self._path(key), key)
        except (OSError, ValueError):  # of which Arrow's errors are
            return None

    def put(self, key: str, rows: Iterable[TokenRow]) -> TokenFile:
        """Write the rows as they come, and read them back. What they raise leaves no file."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._tidy()
        descriptor, name = tempfile.mkstemp(prefix=f".{key}-", suffix=".part", dir=self._folder)
        part = Path(name)
        try:
            with open(descriptor, "w+b") as stream:
                _write(stream, key, rows)
                stream.flush()
                stream.seek(0)
                stream.write(hashlib.file_digest(stream, "sha256").digest())
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(self._path(key))
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        return TokenFile(self._path(key), key)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.tokens"

    def _tidy(self) -> None:
        for part in self._folder.glob(".*.part"):
            try:
                if time.time() - part.stat().st_mtime > STALE_S:
                    part.unlink(missing_ok=True)
            except FileNotFoundError:  # its writer has just finished
                continue


def _write(stream: Any, key: str, rows: Iterable[TokenRow]) -> None:
    source = iter(rows)
    schema = _SCHEMA.with_metadata({_KEY: key})
    with pa.ipc.new_file(pa.PythonFile(stream, "w"), schema) as writer:
        while batch := list(islice(source, ROWS)):
            columns = [_columns(row) for row in batch]
            writer.write_batch(pa.RecordBatch.from_pylist(columns, schema=schema))


def _columns(row: TokenRow) -> dict[str, Any]:
    example, loss_tokens = row.example, 0
    if example is not None:
        loss_tokens = sum(label != IGNORED for label in example.labels)
        masked = len(example.labels) - loss_tokens
        # Loss runs from one token to the end, or check_example has not seen the example.
        assert example.labels[masked:] == example.input_ids[masked:]
    return {
        "id": row.id,
        "tokens": row.tokens,
        "loss_tokens": loss_tokens,
        "input_ids": [] if example is None else np.array(example.input_ids, np.int32),
        "reason": row.reason,
        "text": row.text,
    }
