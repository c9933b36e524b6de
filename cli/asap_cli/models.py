"""`asap models`: the registry of a server, and model folders that are checked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from asap.errors import InvalidInput, NotFound
from asap_cli.server_commands import HERE, Server, api_key, print_table, say

if TYPE_CHECKING:
    from asap_cli.models_client import ModelsClient

__all__ = ["models_app", "read_reference"]

models_app = typer.Typer(
    help="Trained models: the registry of a server, and verified folders.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Reference = Annotated[str, typer.Argument(metavar="NAME@V", help="A version of a model.")]


@models_app.command("list")
def list_models(
    name: Annotated[str | None, typer.Option(help="Only versions of this name.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=500, help="Most versions to list.")] = 50,
    server: Server = HERE,
) -> None:
    """List the models: by name, the newest version of each first."""
    from asap_cli.tables import models_table

    with _client(server) as client:
        page = client.models(name, limit)
    print_table(models_table(page.models))
    if page.next_cursor is not None:
        say(f"these are the first {limit}; --limit shows more")


@models_app.command()
def show(
    reference: Annotated[
        str,
        typer.Argument(
            metavar="NAME[@V]", help="Without a version the one in production, else the newest."
        ),
    ],
    server: Server = HERE,
) -> None:
    """Print a version's facts and figures."""
    from asap_cli.tables import model_table

    with _client(server) as client:
        print_table(model_table(client.model(*read_reference(reference))))


@models_app.command()
def stage(
    reference: Reference,
    stage: Annotated[
        Literal["none", "staging", "production"],
        typer.Argument(help="In production it takes the place of the one that is there."),
    ],
    server: Server = HERE,
) -> None:
    """Move a version to a stage."""
    with _client(server) as client:
        moved = client.move(*_version(reference), stage)
    say(f"{moved.name}@{moved.version} is in {moved.stage}")


@models_app.command()
def remove(reference: Reference, server: Server = HERE) -> None:
    """Delete a version with its files; never the one in production."""
    with _client(server) as client:
        client.remove(*_version(reference))
    say(f"{reference} is deleted")


@models_app.command()
def fetch(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Hub name, directory, NAME@V of the local registry, or s3:// or file:// below the "
            "blob store.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the model.")],
    revision: Annotated[str | None, typer.Option(help="Commit of the hub.")] = None,
    sha256: Annotated[
        str | None, typer.Option(metavar="HASH", help="What this command printed before.")
    ] = None,
) -> None:
    """Put a model's weights (safetensors only), configuration and tokenizer into a folder, check
    them, and print their hash. What is there already is only checked.
    """
    from asap_cli.model_fetch import fetch_model

    typer.echo(fetch_model(model, out, revision=revision, sha256=sha256))


def read_reference(text: str) -> tuple[str, int | None]:
    """`NAME` or `NAME@V`. Raises InvalidInput."""
    name, at, number = text.partition("@")
    if not name or (at and not (number.isascii() and number.isdecimal() and int(number))):
        raise InvalidInput(f"expected NAME or NAME@VERSION, not {text!r}")
    if not all(c.isascii() and (c.isalnum() or c in "._-") for c in name) or name[0] == ".":
        raise NotFound(f"there is no model {name[:64]!r}")
    return name, int(number) if at else None


def _version(text: str) -> tuple[str, int]:
    name, version = read_reference(text)
    if version is None:
        raise InvalidInput(f"name the version, as in {name}@1")
    return name, version


def _client(server: str) -> ModelsClient:
    from asap_cli.models_client import ModelsClient

    return ModelsClient.open(server, key=api_key())
