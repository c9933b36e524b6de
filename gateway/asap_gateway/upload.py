"""An uploaded file to the lines of a job: spooled to disk, read line by line, never whole in
memory.
"""

from __future__ import annotations

import shutil
import tempfile
from itertools import chain, islice
from pathlib import Path

from fastapi import UploadFile
from pydantic import ValidationError

from asap.errors import InvalidInput
from asap_gateway.schemas import JobOptions
from asap_gateway.service import Gateway
from asap_runtime.datasets import read_lines
from asap_runtime.schemas import detect_schema, read_triples

__all__ = ["parse_options", "submit_upload"]

ENDINGS = (".jsonl.gz", ".ndjson.gz", ".jsonl", ".ndjson", ".parquet")
PEEK = 32


def parse_options(text: str) -> JobOptions:
    """The options that came as a form field. Raises InvalidInput."""
    try:
        return JobOptions.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = "".join(f"/{part}" for part in first["loc"])
        errors = [{"pointer": f"/options{where}", "detail": first["msg"]}]
        raise InvalidInput(f"/options{where}: {first['msg']}", errors=errors) from None


def submit_upload(gateway: Gateway, tenant: str, file: UploadFile, options: JobOptions) -> str:
    """The id of a job of the file's lines. The file's name tells its format and nothing else."""
    name = (file.filename or "").lower()
    ending = next((ending for ending in ENDINGS if name.endswith(ending)), None)
    if ending is None:
        raise InvalidInput(
            f"the file's name must end in one of {', '.join(ENDINGS)}",
            code="unsupported-media-type",
        )
    with tempfile.TemporaryDirectory(prefix="asap-upload-") as folder:
        path = Path(folder) / f"upload{ending}"
        with path.open("wb") as stream:
            shutil.copyfileobj(file.file, stream, 1 << 20)
        lines = read_lines(str(path))
        head = list(islice(lines, PEEK))
        schema = detect_schema([line.row for line in head if line.row is not None])
        if schema is None:
            raise InvalidInput("the file holds no line with a known schema")
        triples = read_triples(chain(head, lines), schema)
        return gateway.submissions.submit_lines(tenant, triples, options)
