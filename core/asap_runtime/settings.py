"""Where a process runs: settings from the environment (ASAP_GROUP__NAME), `asap.toml` and defaults.

Never what an experiment is: that is the configuration, which travels with the data. Read once, in a
process's entry, and passed down.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from asap.errors import Misconfigured

__all__ = [
    "BlobSettings",
    "DatabaseSettings",
    "Group",
    "QueueSettings",
    "RuntimeSettings",
    "TelemetrySettings",
    "load_settings",
    "redacted",
]

PREFIX = "ASAP_"
# Groups of other roles and names of tools: a process ignores them, but a name outside is a typing
# error.
KNOWN_ELSEWHERE = frozenset(
    {
        "llm",
        "surprisal",
        "gateway",
        "auth",
        "webhooks",
        "serving",
        "trainer",
        "evaluator",
        "cache_dir",
        "test_data",
        "require_engines",
        "server",
        "api_key",
    }
)


class Group(BaseModel):
    """Base of all groups: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DatabaseSettings(Group):
    """The database: the truth about jobs and items."""

    url: SecretStr | None = None
    """sqlite:///FILE or postgresql+psycopg://…; default: a file in ASAP_HOME."""


class QueueSettings(Group):
    """The broker: a hint that may vanish."""

    url: SecretStr = SecretStr("memory://")
    """memory://, redis:// or rediss://"""


class BlobSettings(Group):
    """The blob store: uploads until they are taken in, and data sets."""

    url: str | None = None
    """file:///FOLDER or s3://BUCKET/PREFIX; default: a folder in ASAP_HOME."""
    endpoint_url: str | None = None
    """Of a server that speaks S3 and is not Amazon's."""
    region: str | None = None
    access_key: SecretStr | None = None
    """With `secret_key`; default: what the environment or the machine's role gives."""
    secret_key: SecretStr | None = None
    min_free_share: float = Field(0.1, ge=0, lt=1)
    """Of a folder's disk; below it uploads are refused."""


class TelemetrySettings(Group):
    """Logs, metrics, traces and probes."""

    log_level: str = Field("info", pattern="^(debug|info|warning|error)$")
    log_json: bool | None = None
    """Default: JSON unless stderr is a terminal."""
    otlp_endpoint: SecretStr | None = None
    """Trace collector, OTLP over HTTP, such as http://collector:4318; default: no traces."""
    admin_host: str = "127.0.0.1"
    """Where a worker serves probes, metrics and its own API; no key is asked for there."""
    admin_port: int | None = Field(None, ge=1, le=65535)
    """Of a worker; the gateway has them on its own port. Default: no such server."""


class RuntimeSettings(BaseSettings):
    """What every role needs; a role adds one group of its own."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        frozen=True,
        extra="forbid",
        toml_file="asap.toml",
    )

    home: Path = Path("~/.asap")
    """Folder of the embedded database and blobs."""
    benchmarks: Path | None = None
    """Folder with the benchmarks' files, for evaluations."""
    database: DatabaseSettings = DatabaseSettings()
    queue: QueueSettings = QueueSettings()
    blobs: BlobSettings = BlobSettings()
    telemetry: TelemetrySettings = TelemetrySettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Command line, environment, asap.toml, defaults, in this order."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @property
    def database_url(self) -> str:
        """The database's URL, with its default filled in."""
        if self.database.url is not None:
            return self.database.url.get_secret_value()
        return f"sqlite:///{self.home.expanduser() / 'asap.db'}"

    @property
    def blobs_url(self) -> str:
        """The blob store's URL, with its default filled in."""
        return self.blobs.url or f"file://{(self.home.expanduser() / 'blobs').absolute()}"

    @property
    def queue_url(self) -> str:
        """The broker's URL."""
        return self.queue.url.get_secret_value()


S = TypeVar("S", bound=RuntimeSettings)


def load_settings(cls: type[S], **command_line: Any) -> S:
    """Settings of one role. Raises Misconfigured for a wrong value or an unknown ASAP_*
    variable.
    """
    check_names(cls, os.environ)
    try:
        return cls(**command_line)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = PREFIX + "__".join(str(part) for part in first["loc"]).upper()
        raise Misconfigured(f"{name}: {first['msg']}") from None


def check_names(cls: type[RuntimeSettings], environment: Mapping[str, str]) -> None:
    """Refuse an unknown ASAP_* variable, naming the nearest known one: a typing error must not
    pass.
    """
    known = _names(cls)
    for variable in environment:
        if not variable.startswith(PREFIX):
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name in known or (name.split("__")[0] in KNOWN_ELSEWHERE - set(cls.model_fields)):
            continue
        near = get_close_matches(name, known, n=1)
        hint = f"; did you mean {PREFIX}{near[0].upper()}?" if near else ""
        raise Misconfigured(f"unknown setting {variable}{hint}")


def _names(cls: type[BaseModel], prefix: str = "") -> set[str]:
    names: set[str] = set()
    for name, field in cls.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names |= _names(kind, f"{prefix}{name}__")
        else:
            names.add(prefix + name)
    return names


def redacted(settings: RuntimeSettings) -> dict[str, Any]:
    """Effective values for people: secrets as stars."""
    return settings.model_dump(mode="json")
