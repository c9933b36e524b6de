"""The command `asap deploy`: options in, one call."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from asap.errors import InvalidInput

__all__ = ["deploy"]


def deploy(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Directory, hub name, or NAME@V of the registry.")
    ],
    name: Annotated[
        str | None, typer.Option(help="What callers name it \\[default: the model's own name].")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port \\[default: a free one].")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Where gateways reach it \\[default: host and port].")
    ] = None,
    tenant: Annotated[str, typer.Option(help="Whose callers it answers.")] = "local",
    server_args: Annotated[
        str, typer.Option(metavar="ARGS", help="Further arguments of vllm serve, in quotes.")
    ] = "",
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds for requests under way, at the end.")
    ] = 60.0,
    kubernetes: Annotated[
        bool, typer.Option("--kubernetes", help="Print a Deployment and a Service; start nothing.")
    ] = False,
    revision: Annotated[
        str, typer.Option(help="With --kubernetes: commit of the hub.", show_default=False)
    ] = "",
    sha256: Annotated[
        str | None, typer.Option(help="With --kubernetes: what `asap models fetch` prints.")
    ] = None,
    namespace: Annotated[str, typer.Option(help="With --kubernetes.")] = "default",
    registry: Annotated[
        str, typer.Option(help="With --kubernetes: of the images.", show_default=False)
    ] = "",
    claim: Annotated[
        str, typer.Option(help="With --kubernetes: volume of the weights.")
    ] = "asap-models",
    gpus: Annotated[int, typer.Option(min=0, help="With --kubernetes: of a pod.")] = 1,
    replicas: Annotated[int, typer.Option(min=0, help="With --kubernetes.")] = 1,
    blobs_secret: Annotated[
        str | None, typer.Option(help="With --kubernetes: Secret with the blob store's keys.")
    ] = None,
) -> None:
    """Serve MODEL with vLLM until Ctrl-C, and let the gateways know."""
    from asap_cli.deploy import DeployOptions, print_manifest, run_deploy

    try:
        arguments = tuple(shlex.split(server_args))
    except ValueError as error:
        raise InvalidInput(f"--server-args: {error}") from None
    options = DeployOptions(model, name, host, port, url, tenant, arguments, grace)
    if not kubernetes:
        raise typer.Exit(run_deploy(options))
    print_manifest(
        options,
        revision=revision,
        sha256=sha256,
        namespace=namespace,
        registry=registry,
        claim=claim,
        gpus=gpus,
        replicas=replicas,
        blobs_secret=blobs_secret,
    )
