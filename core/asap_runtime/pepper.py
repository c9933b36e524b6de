"""The pepper: the server's part in the hash of every API key, from the settings or a file."""

from __future__ import annotations

import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from asap.errors import Misconfigured
from asap_runtime.settings import Group, RuntimeSettings

__all__ = ["AuthSettings", "KeySettings", "load_pepper"]

SHORTEST = 16


class AuthSettings(Group):
    """API keys. Without any key in the database a server is open to its own machine alone."""

    pepper: SecretStr | None = Field(None, min_length=SHORTEST)
    """Secret that goes into the hash of every key; another one makes all keys invalid. Default: a
    file `pepper` in ASAP_HOME, made once. Servers on several machines need the same one: set it.
    """


class KeySettings(RuntimeSettings):
    """What the keys alone need; the same file may hold the groups of every role."""

    model_config = SettingsConfigDict(extra="ignore")

    auth: AuthSettings = AuthSettings()


def load_pepper(settings: AuthSettings, home: Path) -> bytes:
    """The pepper of the settings, or of the file in `home`, made when it is missing.

    Of several processes that make it at once, one does. Raises Misconfigured.
    """
    if settings.pepper is not None:
        return settings.pepper.get_secret_value().encode()
    path = home.expanduser() / "pepper"
    try:
        if not path.exists():
            _make_pepper(path)
        pepper = path.read_bytes().strip()
    except OSError as error:
        raise Misconfigured(
            f"the file {path} cannot be used ({error.strerror}); set ASAP_AUTH__PEPPER instead"
        ) from error
    if len(pepper) < SHORTEST:
        raise Misconfigured(f"the file {path} holds less than {SHORTEST} characters")
    return pepper


def _make_pepper(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A file that appears whole: a reader never sees an empty one. Its mode is 0600.
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix="pepper-") as file:
        file.write(secrets.token_hex(32).encode())
        file.flush()
        os.fsync(file.fileno())
        with suppress(FileExistsError):  # another process was first
            os.link(file.name, path)
