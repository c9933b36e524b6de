"""`asap keys`: API keys in the database of the settings, made and revoked by who can reach it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from asap.errors import InvalidInput, NotFound

if TYPE_CHECKING:
    from asap_runtime.database import Database
    from asap_runtime.keys import KeyRing

__all__ = ["keys_app"]

keys_app = typer.Typer(
    help="API keys of a server, in the database of the settings.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

DAY_S = 24 * 3600.0
PIPED_WIDTH = 200


@keys_app.command()
def create(
    name: Annotated[str, typer.Option(help="Who will hold the key; two live keys per name.")],
    role: Annotated[
        str, typer.Option(help="read, submit (and read) or admin (and both).")
    ] = "submit",
    tenant: Annotated[
        str, typer.Option(help="Whose jobs it sees; local owns those made without keys.")
    ] = "local",
    expires_days: Annotated[
        int | None, typer.Option(min=1, max=3650, help="Days until it expires \\[default: never].")
    ] = None,
) -> None:
    """Make a key and print it, once: only its hash is stored."""
    expires_in_s = None if expires_days is None else expires_days * DAY_S
    with _keys() as (database, ring):
        key, token = ring.create(tenant, name, role, expires_in_s)
        _record(database, key.tenant, "create", key.id)
    typer.echo(token)
    until = "" if key.expires_at is None else f", until {_time(key.expires_at)}"
    _say(
        f"key {key.id} of tenant {key.tenant}, role {key.role}{until}; it is shown this once. "
        f"Send it as `Authorization: Bearer KEY`; `asap keys revoke {key.id}` ends it"
    )


@keys_app.command()
def ensure(
    name: Annotated[str, typer.Option(help="Who holds the key.")],
    role: Annotated[str, typer.Option(help="read, submit or admin.")] = "submit",
    tenant: Annotated[str, typer.Option(help="Whose jobs it sees.")] = "local",
) -> None:
    """Add the key that ASAP_API_KEY holds, unless it is known; safe to repeat."""
    token = os.environ.get("ASAP_API_KEY")
    if not token:
        raise InvalidInput("ASAP_API_KEY is not set: it holds the key to add")
    with _keys() as (database, ring):
        key = ring.ensure(tenant, name, role, token)
        _record(database, key.tenant, "ensure", key.id)
    _say(f"key {key.id} of tenant {key.tenant} is {key.state}, role {key.role}")


@keys_app.command("list")
def list_keys(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
) -> None:
    """List the keys, without what they open."""
    with _keys() as (_, ring):
        keys = ring.list(tenant)
    columns = ("id", "tenant", "name", "role", "state", "created", "expires", "last used")
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True)
    for key in keys:
        moments = (_time(at) for at in (key.created_at, key.expires_at, key.last_used_at))
        words = (key.id, key.tenant, key.name, key.role, key.state, *moments)
        table.add_row(*map(Text, words))
    console = Console()
    if not console.is_terminal:
        console.width = PIPED_WIDTH  # what a program reads is never cut
    console.print(table, highlight=False)


@keys_app.command()
def revoke(key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's id.")]) -> None:
    """End a key for good; safe to repeat."""
    with _keys() as (database, ring):
        key = ring.revoke(key_id)
        if key is None:
            raise NotFound(f"there is no key {key_id!r}; `asap keys list` names all")
        _record(database, key.tenant, "revoke", key.id)
    _say(f"key {key_id} is revoked; running servers refuse it within 5 seconds")


@contextmanager
def _keys() -> Iterator[tuple[Database, KeyRing]]:
    from asap_runtime.host import open_database
    from asap_runtime.keys import KeyRing
    from asap_runtime.pepper import KeySettings, load_pepper
    from asap_runtime.settings import load_settings

    settings = load_settings(KeySettings)
    database = open_database(settings)
    try:
        yield database, KeyRing(database, load_pepper(settings.auth, settings.home))
    finally:
        database.close()


def _record(database: Database, tenant: str, command: str, key_id: str) -> None:
    from asap_runtime.audit import AuditTrail

    AuditTrail(database).record(
        tenant=tenant,
        actor=f"uid:{os.getuid()}",
        action=f"asap keys {command}",
        object=key_id,
        result="ok",
    )


def _time(at: int | None) -> str:
    if at is None:
        return "-"
    return datetime.fromtimestamp(at / 1e6).astimezone().strftime("%Y-%m-%d %H:%M")


def _say(text: str) -> None:
    """A sentence for people, on stderr: stdout holds what scripts read."""
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)
