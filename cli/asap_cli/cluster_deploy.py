"""`asap deploy --kubernetes`: a model behind vLLM servers of a cluster."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from asap.errors import InvalidInput
from asap_cli.deploy import DeployOptions, registered, served_name
from asap_cli.roles import AllSettings
from asap_cli.serving_cluster import ServingCluster
from asap_cli.serving_manifest import ServedModel, render_manifest
from asap_runtime.host import open_database
from asap_runtime.models import ModelRegistry, parse_reference
from asap_runtime.settings import load_settings

__all__ = ["print_manifest", "remove_from_cluster", "run_in_cluster"]


def run_in_cluster(
    options: DeployOptions, *, context: str | None, timeout_s: float, **served: Any
) -> None:
    """Apply Deployment and Service, and return when the pods are ready. `served`: further fields
    of `ServedModel`.

    Raises InvalidInput for a model that no pod could fetch, and what `ServingCluster` raises.
    """
    model = _served(options, **served)
    manifest = render_manifest(model)
    cluster = ServingCluster(context=context, timeout_s=timeout_s, say=_say)
    deployment, service = _objects(manifest)
    cluster.apply(deployment, service)
    cluster.wait(deployment)
    _say_setting(model)


def remove_from_cluster(
    options: DeployOptions, *, context: str | None, timeout_s: float, namespace: str
) -> None:
    """Delete the Deployment and Service of that name. Raises what `ServingCluster` does."""
    model = ServedModel(served_name(options), source="", version="", namespace=namespace)
    manifest = render_manifest(model)
    cluster = ServingCluster(context=context, timeout_s=timeout_s, say=_say)
    deployment, service = _objects(manifest)
    cluster.remove(service, deployment)


def print_manifest(options: DeployOptions, **served: Any) -> None:
    """Print Deployment and Service. Raises InvalidInput for a model that no pod could fetch."""
    model = _served(options, **served)
    typer.echo(render_manifest(model), nl=False)
    _say_setting(model)


def _objects(manifest: str) -> tuple[dict[str, Any], dict[str, Any]]:
    import yaml  # the client brings it along, and a `ServingCluster` has that

    deployment, service = yaml.safe_load_all(manifest)
    return deployment, service


def _served(options: DeployOptions, *, sha256: str | None, **cluster: Any) -> ServedModel:
    settings = load_settings(AllSettings)
    source, version = options.model, None
    if Path(source).expanduser().is_dir():
        raise InvalidInput(
            f"{source!r} is a folder of this machine; name a model of the hub, or one of the "
            "registry whose blob store the cluster can reach"
        )
    if parse_reference(source) is not None:
        database = open_database(settings)
        try:
            version = registered(ModelRegistry(database), options)
        finally:
            database.close()
    if version is not None:
        source, sha256 = (
            f"{settings.blobs_url.rstrip('/')}/{version.prefix}",
            version.manifest_sha256,
        )
    stored = "://" in source
    if stored and not source.startswith("s3://"):
        raise InvalidInput("the blob store is a folder of this machine; pods need one in s3://…")
    return ServedModel(
        model=served_name(options),
        source=source,
        version=metadata.version("asap-cot"),
        sha256=sha256 or "",
        arguments=options.server_args,
        blob_settings=_blob_settings(settings) if stored else {},
        **cluster,
    )


def _blob_settings(settings: AllSettings) -> dict[str, str]:
    blobs = settings.blobs
    values = {
        "ASAP_BLOBS__URL": settings.blobs_url,
        "ASAP_BLOBS__ENDPOINT_URL": blobs.endpoint_url,
        "ASAP_BLOBS__REGION": blobs.region,
    }
    return {name: value for name, value in values.items() if value}


def _say(text: str) -> None:
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


def _say_setting(model: ServedModel) -> None:
    _say(f'the gateway needs ASAP_SERVING__ENDPOINTS=\'{{"{model.model}": ["{model.url}"]}}\'')
