"""A sample of all settings as lines of an environment file, made from the classes themselves.

Every line is a comment: who copies the file changes nothing until a line is uncommented.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, SecretStr
from pydantic_core import to_jsonable_python

from asap_cli.roles import AllSettings
from asap_runtime.settings import PREFIX, RuntimeSettings

__all__ = ["env_example"]

HEAD: Final = """\
# All settings with their defaults. Nothing reads this file by itself: uncomment what you change in
# a copy named .env, then `set -a; . ./.env; set +a`, or name it in your service manager.
# The same names, nested and in small letters, may stand in asap.toml instead.
# Made by `asap config --example`.

# For `asap jobs`: the server, and your API key there.
#ASAP_SERVER=http://127.0.0.1:8000
#ASAP_API_KEY=
"""
BOUNDS: Final = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
    "pattern": "of the form",
}
TYPES: Final = {
    "integer": "whole number",
    "boolean": "true or false",
    "string": "text",
    "array": "JSON list",
    "object": "JSON object",
}
WIDTH: Final = 98


def env_example() -> str:
    """The whole file."""
    schema = AllSettings.model_json_schema()
    inner = _groups(AllSettings)
    parts = [HEAD, "\n"]
    for name in AllSettings.model_fields:
        if name not in inner:
            parts.append(_setting(RuntimeSettings, name, PREFIX, schema))
    for name, group in inner.items():
        parts += _section(group, f"{PREFIX}{name.upper()}__", schema["$defs"])
    return "".join(parts)


def _section(group: type[BaseModel], prefix: str, shapes: dict[str, Any]) -> Iterator[str]:
    """A group's own settings, then the groups in it."""
    yield f"\n## {inspect.getdoc(group)}\n\n"
    inner = _groups(group)
    for name in group.model_fields:
        if name not in inner:
            yield _setting(group, name, prefix, shapes[group.__name__])
    for name, further in inner.items():
        yield from _section(further, f"{prefix}{name.upper()}__", shapes)


def _groups(kind: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The fields that are groups of settings."""
    return {
        name: field.annotation
        for name, field in kind.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


def _setting(group: type[BaseModel], name: str, prefix: str, schema: dict[str, Any]) -> str:
    kind, words = _kind(schema["properties"][name]), _docs(group).get(name, "")
    comment = _comment(f"{kind}. {words}" if kind else words)
    default = group.model_fields[name].get_default(call_default_factory=True)
    return f"{comment}#{prefix}{name.upper()}={_value(default)}\n"


def _kind(shape: dict[str, Any]) -> str:
    """The type and its bounds in words; none where the setting's own validator decides."""
    if "anyOf" in shape:
        kinds = [_kind(one) for one in shape["anyOf"] if one.get("type") != "null"]
        return " or ".join(kinds)
    if "enum" in shape or "const" in shape:
        return " or ".join(shape.get("enum") or [shape["const"]])
    name = "secret" if shape.get("format") == "password" else shape.get("type", "")
    bounds = [f"{word} {shape[key]}" for key, word in BOUNDS.items() if key in shape]
    if "minLength" in shape:
        bounds.append(f"at least {shape['minLength']} characters")
    return ", ".join([TYPES.get(name, name), *bounds])


def _value(default: object) -> str:
    """As the environment would say it; empty where the default is nothing at all."""
    if default is None:
        return ""
    if isinstance(default, SecretStr):
        return default.get_secret_value()  # one of the source, known to everybody
    return (
        str(default) if isinstance(default, str | Path) else json.dumps(to_jsonable_python(default))
    )


@cache
def _docs(group: type[BaseModel]) -> dict[str, str]:
    """The sentence below each field of the class, which Python itself does not keep."""
    [tree] = ast.parse(textwrap.dedent(inspect.getsource(group))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, below in pairwise(tree.body):
        match field, below:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(words))),
            ):
                found[name] = " ".join(words.split())
    return found


def _comment(text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent="# ", subsequent_indent="# ") + "\n"
