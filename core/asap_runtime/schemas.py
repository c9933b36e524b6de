"""Which fields of a data set hold question, CoT and answer: detected from the rows, never guessed
twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import JsonValue, TypeAdapter, ValidationError

from asap.errors import AsapError, InvalidInput
from asap.thinking import CLOSE, OPEN, parse_generation
from asap.types import Record, Triple
from asap_runtime.datasets import Line

__all__ = ["SCHEMAS", "Schema", "detect_schema", "read_triples", "to_triple"]

Schema = Literal["triple", "reasoning_content", "generation", "messages", "record"]
SCHEMAS: dict[Schema, str] = {
    "triple": "question, cot, answer",
    "reasoning_content": "prompt, reasoning_content and the final text",
    "generation": "prompt and generation with <think> … </think>",
    "messages": "chat messages; the last assistant turn holds the thinking",
    "record": "records written by this program",
}

# First name found wins; the paper's data set (open-r1/codeforces-cots) has prompt, generation,
# messages.
_QUESTION = ("question", "prompt", "problem", "instruction", "input")
_ANSWER = ("answer", "response", "content", "output", "solution")
_COT = ("cot", "reasoning", "thinking")
_REASONING = "reasoning_content"
_GENERATION = ("generation", "completion", "response", "output", "answer", "content")
_IDS = ("id", "uuid", "task_id")
_json_value: TypeAdapter[JsonValue] = TypeAdapter(JsonValue)

Row = Mapping[str, Any]


def detect_schema(rows: Iterable[Row]) -> Schema | None:
    """The schema that most rows have; None when no row has any."""
    votes = Counter(schema for row in rows if (schema := _schema_of(row)) is not None)
    return votes.most_common(1)[0][0] if votes else None


def _schema_of(row: Row) -> Schema | None:
    if isinstance(row.get("triple"), Mapping) or isinstance(row.get("record"), str):
        return "record"
    if _first(row, _QUESTION) and _first(row, _COT) and _first(row, _ANSWER):
        return "triple"
    if _first(row, _QUESTION) and _REASONING in row and _first(row, _ANSWER):
        return "reasoning_content"
    if _first(row, _QUESTION) and (name := _thinking_field(row)) and isinstance(row[name], str):
        return "generation"
    if isinstance(row.get("messages"), list | tuple):
        return "messages"
    return None


def read_triples(lines: Iterable[Line], schema: Schema) -> Iterator[tuple[int, Triple | AsapError]]:
    """(line number, triple or what is wrong with the line) for each line, in order."""
    for line in lines:
        if line.row is None:
            assert line.error is not None
            yield line.number, line.error
            continue
        try:
            yield line.number, to_triple(line.row, schema)
        except InvalidInput as error:
            yield line.number, error


def to_triple(row: Row, schema: Schema) -> Triple:
    """The triple of one row. Raises InvalidInput with the field that is missing or wrong."""
    if row.get("finish_reason") == "length":
        raise InvalidInput(
            "the response was cut off (finish_reason is 'length')", code="truncated-source"
        )
    match schema:
        case "triple":
            used = [_need(row, names) for names in (_QUESTION, _COT, _ANSWER)]
            parts = [_text(row, name) for name in used]
        case "reasoning_content":
            used = [_need(row, _QUESTION), _need(row, (_REASONING,)), _need(row, _ANSWER)]
            parts = [_text(row, name) for name in used]
        case "generation":
            field = _thinking_field(row) or _need(row, _GENERATION)
            used = [_need(row, _QUESTION), field]
            generation = _text(row, field)
            parts = [_text(row, used[0]), *parse_generation(generation, implicit_open=True)]
        case "messages":
            used = ["messages"]
            parts = _from_messages(row)
        case "record":
            return _from_record(row)
    identity = _first(row, _IDS)
    meta = {
        name: _as_json(value)
        for name, value in row.items()
        if name not in (*used, identity, "messages") and value is not None
    }
    question, cot, answer = parts
    triple = Triple(
        id="" if identity is None else str(row[identity]),
        question=question,
        cot=cot,
        answer=answer,
        meta=meta,
    )
    triple.check()
    return triple


def _thinking_field(row: Row) -> str | None:
    for name in _GENERATION:
        if isinstance(row.get(name), str) and (OPEN in row[name] or CLOSE in row[name]):
            return name
    return "generation" if "generation" in row else None


def _from_messages(row: Row) -> list[str]:
    turns = row.get("messages")
    if not isinstance(turns, list | tuple) or not all(isinstance(turn, Mapping) for turn in turns):
        raise InvalidInput("field 'messages' must be a list of {role, content} objects")
    users = [_text(turn, "content") for turn in turns if turn.get("role") == "user"]
    if not users or not turns or turns[-1].get("role") != "assistant":
        raise InvalidInput("'messages' must hold a user turn and end with an assistant turn")
    if len(users) > 1:
        raise InvalidInput(f"'messages' holds {len(users)} user turns; one is supported")
    answer = turns[-1]
    reasoning = answer.get(_REASONING) or answer.get("reasoning")
    if isinstance(reasoning, str):
        return [users[0], reasoning, _text(answer, "content")]
    return [users[0], *parse_generation(_text(answer, "content"), implicit_open=True)]


def _from_record(row: Row) -> Triple:

    try:
        if isinstance(row.get("record"), str):
            return Record.model_validate_json(row["record"]).triple
        return Triple.model_validate(row.get("triple"))
    except ValidationError as error:
        raise InvalidInput(f"not a record of this program: {_first_error(error)}") from error


def _first_error(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"


def _first(row: Row, names: Sequence[str]) -> str | None:
    return next((name for name in names if row.get(name) is not None), None)


def _need(row: Row, names: Sequence[str]) -> str:
    name = _first(row, names)
    if name is None:
        wanted = repr(names[0])
        if len(names) > 1:
            wanted += f" (or {', '.join(map(repr, names[1:]))})"
        raise InvalidInput(f"field {wanted} is missing", code="missing-field")
    return name


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise InvalidInput(f"field {name!r} must be text, not {type(value).__name__}")
    return value


def _as_json(value: Any) -> JsonValue:
    try:
        return _json_value.validate_python(value)
    except ValidationError:
        return str(value)
