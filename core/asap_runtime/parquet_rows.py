"""Parquet files of strangers: read by a child process with bounded memory, which prints JSON lines.

The format is read by native code that trusts sizes written in the file; what that leads to, a
crash or an endless allocation, ends the child and nothing else.
"""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asap.errors import InvalidInput
from asap_runtime.json_lines import Line, ReadLimits, read_json_lines

__all__ = ["read_parquet"]

MEMORY_BYTES = 4 * 2**30
"""Address space of the child; libraries and thread stacks take about one GiB of it."""
MAX_COLUMNS = 1000
MAX_GROUP_BYTES = 2**30
"""Of a row group after expanding, as the file says it."""
ROWS = 64
BUFFER = 2**20
REFUSED = 65
"""Exit code of a child that has said in words why it reads no further."""


def read_parquet(path: Path, limits: ReadLimits, *, after: int = 0) -> Iterator[Line]:
    """The rows of the file as lines. A file that cannot be read ends in a fatal line."""
    command = [sys.executable, "-m", "asap_runtime.parquet_rows", str(path), str(after)]
    number, pipe = after, subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, env={}) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        try:
            for line in read_json_lines(child.stdout, limits):
                number += 1
                yield Line(number, line.row, line.error, line.fatal)
            reason = child.stderr.read(1000).decode(errors="replace").strip()
            code = child.wait()
        finally:
            child.kill()
    if code:
        said = reason.splitlines()[-1] if code == REFUSED and reason else "the file is broken"
        yield Line(number + 1, None, InvalidInput(f"no readable Parquet file: {said}"), fatal=True)


def main(path: str, after: int) -> int:
    """Print the rows from number `after` on; the exit code."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import pyarrow as pa
    import pyarrow.parquet as pq

    pa.set_memory_pool(pa.system_memory_pool())
    pa.set_cpu_count(1)
    try:
        file = pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False)
        _check(file.metadata)
        number = 0
        for batch in file.iter_batches(batch_size=ROWS, use_threads=False):
            if number + len(batch) > after:
                for row in batch.slice(max(0, after - number)).to_pylist():
                    print(_line(row))  # noqa: T201 - the parent reads it
            number += len(batch)
    except (pa.ArrowException, OSError, MemoryError, ValueError) as error:
        print(str(error).splitlines()[0][:200], file=sys.stderr)  # noqa: T201
        return REFUSED
    return 0


def _check(metadata: Any) -> None:
    if metadata.num_columns > MAX_COLUMNS:
        raise ValueError(f"{metadata.num_columns} columns; at most {MAX_COLUMNS} are read")
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).total_byte_size
        if size > MAX_GROUP_BYTES:
            raise ValueError(f"a row group of {size:,} bytes; at most {MAX_GROUP_BYTES:,} are read")


def _line(row: dict[str, Any]) -> str:
    """A missing number is none; what JSON does not know becomes text."""
    members = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(members, default=str)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
