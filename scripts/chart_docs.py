"""From deploy/helm/values.yaml: values.schema.json, and README.md with a table of all keys.

A comment above a key says what it is; its line `@schema X` what the value may be, beyond the type
of the default. X is a name of SHAPES or a JSON schema in one line. Sections are closed: a key that
is not in values.yaml is an error. `--check` writes nothing and fails when a file is not up to date.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import BaseModel, SecretStr

from asap_cli.roles import AllSettings
from asap_evaluator.settings import EvaluatorSettings
from asap_runtime.settings import PREFIX, RuntimeSettings
from asap_trainer.settings import TrainerSettings

CHART: Final = Path(__file__).parent.parent / "deploy" / "helm"

Schema = dict[str, Any]

_STRINGS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
_NAME = "^([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?)?$"
_QUANTITY: Schema = {"type": ["string", "integer"], "pattern": r"^[0-9]+(\.[0-9]+)?(m|[kMGT]i?)?$"}
SHAPES: Final[dict[str, Schema]] = {
    "name": {"type": "string", "pattern": _NAME},
    "names": {"type": "array", "items": {"type": "string", "pattern": _NAME, "minLength": 1}},
    "entry": {"type": "string", "pattern": "^[A-Za-z0-9._-]+$"},
    "tag": {"type": "string", "pattern": r"^([A-Za-z0-9_][A-Za-z0-9._-]{0,127})?$",
            "not": {"const": "latest"}},
    "digest": {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"},
    "pinned": {"type": "string", "pattern": r"^\S+(:[A-Za-z0-9_][\w.-]*|@sha256:[0-9a-f]{64})$",
               "not": {"pattern": ":latest$"}},
    "quantity": _QUANTITY,
    "strings": _STRINGS,
    "object": {"type": "object"},
    "objects": {"type": "array", "items": {"type": "object"}},
    "peers": {
        "type": "array",
        "items": {
            "type": "object",
            "additionalProperties": False,
            "minProperties": 1,
            "properties": {
                "ipBlock": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["cidr"],
                    "properties": {
                        "cidr": {"type": "string", "pattern": "^[0-9a-fA-F.:]+/[0-9]{1,3}$"},
                        "except": {"type": "array", "items": {"type": "string"}},
                    },
                },
                "podSelector": {"type": "object"},
                "namespaceSelector": {"type": "object"},
            },
        },
    },
    "ports": {
        "type": "array",
        "minItems": 1,
        "items": {"type": "integer", "minimum": 1, "maximum": 65535},
    },
}  # fmt: skip
"""Names that `@schema` may use, beside `settings`, `component` and `resources`."""

_MANAGED: Final = re.compile(
    "ASAP_(HOME|DATABASE__.*|QUEUE__.*|BLOBS__(URL|ENDPOINT_URL|REGION)"
    "|TELEMETRY__ADMIN_.*|GATEWAY__(HOST|PORT)|EVALUATOR__SANDBOX_(MIN_LEVEL|UID)"
    "|TRAINER__(LAUNCHER|WORK_DIR|PYTHON)|TRAINER__KUBERNETES__(NAMESPACE|INSTANCE|KUBECONFIG"
    "|IMAGE|SERVICE_ACCOUNT|PRIORITY_CLASS|MODEL_CACHE_CLAIM|ENV_SECRETS|IMAGE_PULL_SECRETS))"
)
"""Settings that the chart decides."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key of values.yaml: where it stands, what its comment says, its default."""

    path: tuple[str, ...]
    words: str
    annotation: Any
    default: Any


def settings() -> list[str]:
    """Names of the settings that values may give: no secrets, and not what the chart decides."""
    roles = (AllSettings, TrainerSettings, EvaluatorSettings)
    found = {name for role in roles for name in _settings(role, PREFIX)}
    return sorted(name for name in found if not _MANAGED.fullmatch(name))


def _settings(group: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in group.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _settings(kind, f"{prefix}{name.upper()}__")
        elif issubclass(group, RuntimeSettings) or SecretStr not in (
            kind, *getattr(kind, "__args__", ())
        ):  # fmt: skip
            yield prefix + name.upper()


def read(text: str) -> list[Key]:
    """All keys in order. Raises ValueError for one without a comment."""
    root = yaml.compose(text)
    assert isinstance(root, yaml.MappingNode)
    return list(_keys(root, (), text.splitlines()))


def _keys(node: yaml.MappingNode, above: tuple[str, ...], lines: list[str]) -> Iterator[Key]:
    for name, value in node.value:
        path = (*above, name.value)
        words, annotation = _comment(lines, name.start_mark.line)
        if not words:
            raise ValueError(f"{'.'.join(path)} has no comment in values.yaml")
        yield Key(path, words, annotation, _plain(value))
        # A map in one line is a value; one with lines of its own is a section.
        if isinstance(value, yaml.MappingNode) and not value.flow_style:
            yield from _keys(value, path, lines)


def _comment(lines: list[str], line: int) -> tuple[str, Any]:
    above: list[str] = []
    while line and lines[line - 1].lstrip().startswith("#"):
        line -= 1
        above.insert(0, lines[line].strip().removeprefix("#").strip())
    annotations = [text.removeprefix("@schema ") for text in above if text.startswith("@schema ")]
    words = " ".join(text for text in above if not text.startswith("@schema "))
    return words, yaml.safe_load(annotations[0]) if annotations else None


def _plain(node: yaml.Node) -> Any:
    return yaml.safe_load(yaml.serialize(node))


def build(keys: list[Key]) -> Schema:
    """The schema of all values."""
    by_path = {key.path: key for key in keys}
    value: Schema = {"type": ["string", "number", "boolean"]}
    amount: Schema = {"$ref": "#/definitions/quantity"}
    shapes = SHAPES | {
        "settings": _closed(dict.fromkeys(settings(), value)),
        "amounts": _closed(dict.fromkeys(("cpu", "memory", "ephemeral-storage"), amount)),
    }

    def below(path: tuple[str, ...]) -> dict[str, Schema]:
        return {p[-1]: of(key) for p, key in by_path.items() if p[:-1] == path}

    def of(key: Key) -> Schema:
        note = key.annotation
        if isinstance(note, str) and note not in ("component", "resources"):
            if note not in shapes:
                raise ValueError(f"{'.'.join(key.path)}: there is no shape {note!r}")
            return {"description": key.words, "$ref": f"#/definitions/{note}"}
        section = below(key.path)
        if section:
            if note == "component":
                section = _over(below(("defaults",)), section)
            if note == "resources":
                amounts: Schema = {"$ref": "#/definitions/amounts"}
                section = dict.fromkeys(section, amounts)
            kind = _closed(section)
        elif isinstance(note, dict) and "entries" in note:
            served = _over(below(("defaults",)), below(("serving", "model")))
            name = "^[a-z]([a-z0-9-]{0,11}[a-z0-9])?$"
            kind = {**_closed({}), "patternProperties": {name: _closed(served)}}
        else:
            kind = {"type": _TYPES[type(key.default)], **(note or {})}
            if kind["type"] in ("object", "array") and note is None:
                raise ValueError(f"{'.'.join(key.path)}: say by @schema what it holds")
        return {**kind, "description": key.words}

    top = below(())
    # Helm itself adds `global` to the values of every chart.
    top["global"] = {"type": "object", "description": "Helm's own."}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the chart asap",
        "definitions": shapes,
        **_closed(top),
    }


def _over(base: dict[str, Schema], own: dict[str, Schema]) -> dict[str, Schema]:
    """Keys of a component: those of the defaults and its own, sections key by key."""
    result = dict(base)
    for name, schema in own.items():
        if "properties" in schema and "properties" in base.get(name, {}):
            inner = _over(base[name]["properties"], schema["properties"])
            schema = {**schema, "properties": inner}
        result[name] = schema
    return result


def _closed(properties: dict[str, Schema]) -> Schema:
    return {"type": "object", "properties": properties, "additionalProperties": False}


_TYPES: Final = {
    bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"
}  # fmt: skip

HEAD: Final = """# The chart

`helm install asap deploy/helm -f deploy/helm/values-demo.yaml` is a trial without a GPU;
[docs/operations.md](../../docs/operations.md) says how to install, size, scale and repair, and
what of it was never run on a real cluster. A component (`gateway`, each of `workers`, each of
`serving.models`) may give any key of `defaults` a value of its own.

This page is made from [values.yaml](values.yaml) by `scripts/chart_docs.py`.

| key | default | meaning |
| --- | --- | --- |
"""


def table(keys: list[Key]) -> str:
    """README.md."""
    rows = []
    for key in keys:
        is_section = any(other.path[:-1] == key.path for other in keys)
        default = "" if is_section else f"`{json.dumps(key.default)}`"
        name, words = ".".join(key.path), key.words.replace("|", "\\|")
        rows.append(f"| `{name}` | {default} | {words} |\n")
    return HEAD + "".join(rows)


def files() -> dict[Path, str]:
    """What should stand in each file."""
    keys = read((CHART / "values.yaml").read_text("utf-8"))
    schema = json.dumps(build(keys), indent=1, ensure_ascii=False) + "\n"
    return {CHART / "values.schema.json": schema, CHART / "README.md": table(keys)}


def main() -> int:
    """Write the files, or with --check tell which are not up to date."""
    made = files()
    if "--check" not in sys.argv:
        for path, text in made.items():
            path.write_text(text, "utf-8")
        return 0
    old = [p.name for p, text in made.items() if not p.exists() or p.read_text("utf-8") != text]
    if old:
        sys.stderr.write(f"run scripts/chart_docs.py: {', '.join(old)} not up to date\n")
    return 1 if old else 0


if __name__ == "__main__":
    sys.exit(main())
