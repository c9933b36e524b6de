"""The configuration of a request: what it says, over the server's defaults, over the library's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from asap.config import PruneConfig
from asap.methods import get_method
from asap_runtime.http_problems import invalid_input
from asap_runtime.rebudgeting import TARGETS

__all__ = ["read_config"]


def read_config(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> PruneConfig:
    """The configuration; InvalidInput names each wrong field by JSON pointer."""
    if any(given.get(name) is not None for name in TARGETS):  # one target, the caller's
        defaults = {name: value for name, value in defaults.items() if name not in TARGETS}
    try:
        config = PruneConfig.model_validate({**defaults, **given})
    except ValidationError as error:
        raise invalid_input(error, "config") from None
    get_method(config.method)
    return config
