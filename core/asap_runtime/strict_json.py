"""JSON from strangers: strict UTF-8, no key twice, no NaN, nothing nested beyond reason."""

from __future__ import annotations

import json
import re
from typing import Any

from asap.errors import InvalidInput

__all__ = ["MAX_DEPTH", "parse_json"]

MAX_DEPTH = 64
"""Deepest nesting of arrays and objects."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(raw: bytes) -> Any:
    """The value. Raises InvalidInput: `invalid-utf8`, also for half a surrogate pair, which JSON
    can spell and UTF-8 cannot; `malformed-json`; or `invalid-input` for a key that stands twice in
    one object, where readers would disagree about its value.
    """
    try:
        value = json.loads(
            raw.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_object
        )
    except UnicodeDecodeError as error:
        raise InvalidInput(f"not UTF-8 at byte {error.start}", code="invalid-utf8") from None
    except RecursionError:
        raise _too_deep() from None
    except json.JSONDecodeError as error:
        at = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}"
        raise InvalidInput(f"not JSON at {at}: {error.msg}", code="malformed-json") from None
    except ValueError as error:
        raise InvalidInput(f"not JSON: {error}", code="malformed-json") from None
    _check_depth(value)
    if _SURROGATE.search(raw):
        _check_surrogates(value)
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise InvalidInput("an object holds the same key twice")
    return members


def _check_depth(value: object) -> None:
    """Level by level, without recursion; text, the bulk of every line, is not looked into."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            for child in _children(parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise _too_deep()


def _children(parent: object) -> Any:
    if isinstance(parent, dict):
        return parent.values()
    return parent if isinstance(parent, list) else ()


def _check_surrogates(value: object) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        detail = "the text holds half a surrogate pair"
        raise InvalidInput(detail, code="invalid-utf8") from None


def _too_deep() -> InvalidInput:
    return InvalidInput(
        f"JSON nested too deeply; at most {MAX_DEPTH} levels are read", code="malformed-json"
    )
