"""What a command was asked for, as one value; options become configurations here and nowhere
else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from asap.config import PruneConfig
from asap.errors import InvalidInput
from asap.methods import get_method
from asap_runtime.layouts import Layout
from asap_runtime.schemas import Schema

Method = Literal["asap", "asap_stage1", "asap_stage2", "direct", "random", "truncate", "original"]
Device = Literal["auto", "cpu", "cuda"]
C = TypeVar("C", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class PruneOptions:
    """One prune command."""

    source: str
    out: Path
    config: PruneConfig
    llm_base_url: str | None
    llm_model: str | None
    llm_concurrency: int
    llm_timeout_s: float
    llm_price: tuple[float, float] | None
    """US dollars per million prompt and completion tokens."""
    scorer: str
    device: Device
    layout: Layout
    schema: Schema | None
    cache_dir: Path | None
    ask: bool

    @staticmethod
    def build_config(assignments: Sequence[str], **values: object) -> PruneConfig:
        """The configuration from options that were given; wrong values name the option."""
        config = read_config(PruneConfig, assignments, **values)
        get_method(config.method)
        return config

    @staticmethod
    def parse_price(text: str | None) -> tuple[float, float] | None:
        """`IN,OUT` as two numbers."""
        if text is None:
            return None
        try:
            price_in, price_out = (float(part) for part in text.split(","))
        except ValueError:
            raise InvalidInput(f"--llm-price must be two numbers IN,OUT, not {text!r}") from None
        return price_in, price_out

    @property
    def reply_cache(self) -> Path:
        """Folder of the content-addressed LLM replies."""
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return (self.cache_dir or Path(base) / "asap") / "replies"


def read_config(kind: type[C], assignments: Sequence[str], **values: object) -> C:
    """A configuration from options that were given and `--set` assignments, which win.

    Raises InvalidInput with one sentence that names the knob.
    """
    given = {name: value for name, value in values.items() if value is not None}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or name not in kind.model_fields:
            raise InvalidInput(
                f"--set {assignment!r}: expected NAME=VALUE with one of "
                f"{', '.join(kind.model_fields)}",
                code="unknown-field",
            )
        given[name] = _value(text)
    return validate_config(kind, given)


def validate_config(kind: type[C], values: dict[str, Any]) -> C:
    """A configuration, or InvalidInput with one sentence that names the knob."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        subject = f"{name}: " if name else ""
        value = f" (got {values[name]!r})" if name in values else ""
        raise InvalidInput(f"{subject}{message}{value}") from None


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text
