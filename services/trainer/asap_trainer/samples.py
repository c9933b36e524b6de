"""Training data in: a file of records, chats, triples or prompts with completions, to samples.

The layout is that of the file's first row and holds for all of them. Whatever other fields a row
carries along are not looked at: a chat's `meta` may well hold the CoT before it was pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from asap.errors import AsapError, InvalidInput, NotFound
from asap.sft import SftSample
from asap.types import Record
from asap_runtime.json_lines import Line, ReadLimits, read_json_lines
from asap_runtime.parquet_rows import read_parquet
from asap_runtime.schemas import Schema, to_triple

__all__ = ["LAYOUTS", "read_samples", "samples_of"]

Row = Mapping[str, Any]

LAYOUTS: dict[str, str] = {
    "record": "what `asap prune` writes: triple and pruned_cot",
    "messages": "a user turn and an assistant turn that holds the thinking",
    "triple": "question, cot, answer",
    "prompt_completion": "prompt, and completion with <think> … </think>",
}
"""Known layouts. A row that could be several has the first of them."""

_KEPT = ("id", "uuid", "task_id", "finish_reason")
_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"


def read_samples(path: Path) -> Generator[SftSample, None, None]:
    """The samples of a JSONL, JSONL.gz or Parquet file, one at a time; told by its first bytes.

    A blob's local copy has no ending to go by. Raises NotFound for a file that cannot be read,
    and InvalidInput for the first line that cannot be used.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(len(_PARQUET))
    except OSError as error:
        raise NotFound(f"{str(path)!r} cannot be read: {error.strerror}") from error
    return _samples_in(path, head)


def _samples_in(path: Path, head: bytes) -> Generator[SftSample, None, None]:
    with closing(_lines(path, head)) as lines:
        yield from samples_of(lines, path.name)


def _lines(path: Path, head: bytes) -> Generator[Line, None, None]:
    if head == _PARQUET:
        yield from read_parquet(path, ReadLimits())
    else:
        compressed = head.startswith(_GZIP)
        yield from read_json_lines(path.open("rb"), ReadLimits(), compressed=compressed)


def samples_of(lines: Iterable[Line], name: str = "") -> Iterator[SftSample]:
    """The samples of these lines, such as a blob's. Raises InvalidInput, which names the line and
    the file, for the first one that cannot be used, and for the id of another one before.
    """
    of = f" of {name!r}" if name else ""
    layout: str | None = None
    seen: dict[str, tuple[int, int]] = {}
    for line in lines:
        try:
            if line.row is None:
                assert line.error is not None
                raise line.error
            layout = layout or _layout_of(line.row)
            sample = _READERS[layout](line.row)
            first, text = seen.setdefault(sample.id, (line.number, hash(sample)))
            if text != hash(sample):
                raise InvalidInput(
                    f"id {sample.id[:64]!r} is that of another sample in line {first}; give each "
                    "sample an id of its own"
                )
        except AsapError as error:
            raise InvalidInput(
                f"line {line.number}{of}: {error.detail}", code=error.problem_code, line=line.number
            ) from error
        yield sample


def _layout_of(row: Row) -> str:
    if isinstance(row.get("triple"), Mapping) or isinstance(row.get("record"), str):
        return "record"
    if "messages" in row:
        return "messages"
    for layout in ("triple", "prompt_completion"):
        if all(name in row for name in _FIELDS[layout]):
            return layout
    known = "; ".join(f"{name} ({what})" for name, what in LAYOUTS.items())
    raise InvalidInput(f"expected a row of a known layout: {known}")


_FIELDS = {"triple": ("question", "cot", "answer"), "prompt_completion": ("prompt", "completion")}


def _from_record(row: Row) -> SftSample:
    if not isinstance(row.get("pruned_cot"), str):
        raise InvalidInput(
            "the record has no pruned_cot; prune it first, or train on the layout 'triple'",
            code="missing-field",
        )
    try:
        whole = row.get("record")
        record = (
            Record.model_validate_json(whole)
            if isinstance(whole, str)
            else Record.model_validate(row)
        )
    except ValidationError as error:
        raise InvalidInput("it is no record of `asap prune` (layout 'record')") from error
    if record.status == "rejected":
        raise InvalidInput("the record was rejected by stage 1; leave it out")
    if (row["pruned_cot"], row.get("status")) != (record.pruned_cot, record.status):
        raise InvalidInput(
            "pruned_cot or status is not what the record's own decisions give, so that it is not "
            "clear what to train on; take the layout 'triple' for texts of your own"
        )
    return _checked(
        {
            "id": record.id,
            "question": record.triple.question,
            "cot": record.pruned_cot,
            "answer": record.triple.answer,
        },
        "triple",
    )


def _from_messages(row: Row) -> SftSample:
    turns = row.get("messages")
    if isinstance(turns, list) and all(isinstance(turn, Mapping) for turn in turns):
        roles = [turn.get("role") for turn in turns]
        if "system" in roles:
            raise InvalidInput(
                "the chat has a system turn, which the training string has no place for; move its "
                "text into the user turn, and do the same wherever the model is asked"
            )
        if roles != ["user", "assistant"]:
            raise InvalidInput("expected one user turn and one assistant turn, in this order")
    return _checked(row, "messages")


def _from_triple(row: Row) -> SftSample:
    return _checked(row, "triple")


def _from_prompt_completion(row: Row) -> SftSample:
    return _checked(row, "generation")


_READERS: dict[str, Callable[[Row], SftSample]] = {
    "record": _from_record,
    "messages": _from_messages,
    "triple": _from_triple,
    "prompt_completion": _from_prompt_completion,
}
_USED: dict[Schema, tuple[str, ...]] = {
    "messages": ("messages",),
    "triple": _FIELDS["triple"],
    "generation": _FIELDS["prompt_completion"],
}


def _checked(row: Row, schema: Schema) -> SftSample:
    """The row as a sample, from the fields of the schema alone, checked like any other triple."""
    used = {name: row[name] for name in (*_KEPT, *_USED[schema]) if name in row}
    triple = to_triple(used, schema)
    return SftSample(id=triple.id, question=triple.question, cot=triple.cot, answer=triple.answer)
