"""The command `asap deploy`: options in, one call."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from asap.errors import InvalidInput

__all__ = ["deploy"]

_ALWAYS = {"model", "name", "kubernetes", "print_only", "remove"}
_OBJECTS = {
    "tenant", "server_args", "revision", "sha256", "namespace", "registry", "claim", "gpus",
    "replicas", "blobs_secret",
}  # fmt: skip
_USED = {
    "without --kubernetes": {"host", "port", "url", "tenant", "server_args", "grace"},
    "with --kubernetes": {*_OBJECTS, "context", "timeout"},
    "with --print": _OBJECTS,
    "with --remove": {"namespace", "context", "timeout"},
}
"""The options that do something, by what is to be done."""


def deploy(
    ctx: typer.Context,
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
        bool,
        typer.Option(
            "--kubernetes", help="Serve in a cluster: apply a Deployment and a Service, and wait."
        ),
    ] = False,
    print_only: Annotated[
        bool, typer.Option("--print", help="With --kubernetes: print the objects; ask no cluster.")
    ] = False,
    remove: Annotated[
        bool, typer.Option("--remove", help="With --kubernetes: delete the objects of MODEL.")
    ] = False,
    context: Annotated[
        str | None,
        typer.Option(help="With --kubernetes: of the kubeconfig \\[default: its current one]."),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=1, help="With --kubernetes: seconds until all pods are ready.")
    ] = 3600.0,
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
    from asap_cli.deploy import DeployOptions, run_deploy

    try:
        arguments = tuple(shlex.split(server_args))
    except ValueError as error:
        raise InvalidInput(f"--server-args: {error}") from None
    options = DeployOptions(model, name, host, port, url, tenant, arguments, grace)
    _check(ctx, kubernetes, print_only, remove)
    if not kubernetes:
        raise typer.Exit(run_deploy(options))

    from asap_cli.cluster_deploy import print_manifest, remove_from_cluster, run_in_cluster

    served = {
        "revision": revision,
        "sha256": sha256,
        "namespace": namespace,
        "registry": registry,
        "claim": claim,
        "gpus": gpus,
        "replicas": replicas,
        "blobs_secret": blobs_secret,
    }
    if print_only:
        print_manifest(options, **served)
    elif remove:
        remove_from_cluster(options, context=context, timeout_s=timeout, namespace=namespace)
    else:
        run_in_cluster(options, context=context, timeout_s=timeout, **served)


def _check(ctx: typer.Context, kubernetes: bool, print_only: bool, remove: bool) -> None:
    """Refuse what would be passed over: who gives an option expects it to do something."""
    if print_only and remove:
        raise InvalidInput("--print or --remove, not both")
    if (print_only or remove) and not kubernetes:
        raise InvalidInput("--print and --remove need --kubernetes")
    mode = "with --kubernetes" if kubernetes else "without --kubernetes"
    mode = "with --print" if print_only else "with --remove" if remove else mode
    for option in ctx.command.params:
        name = option.name or ""
        source = ctx.get_parameter_source(name)
        given = source is not None and source.name == "COMMANDLINE"
        if given and name not in _ALWAYS | _USED[mode]:
            raise InvalidInput(f"{option.opts[0]} does nothing {mode}")
