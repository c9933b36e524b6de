"""A served model as Kubernetes objects: Deployment and Service of the chart, without Helm."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from asap.errors import InvalidInput

__all__ = ["ServedModel", "render_manifest"]

BLOB_SECRETS = ("ASAP_BLOBS__ACCESS_KEY", "ASAP_BLOBS__SECRET_KEY")
_LABEL = re.compile(r"[a-z]([a-z0-9-]{0,39}[a-z0-9])?")
_FOLDER_CHARS, _HASH_CHARS = 48, 12


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What is served, and where in the cluster."""

    model: str
    """What callers name it."""
    source: str
    """Hub name, or s3://… below the blob store."""
    version: str
    """Of our images."""
    revision: str = ""
    sha256: str = ""
    arguments: Sequence[str] = ()
    """Further ones of `vllm serve`."""
    instance: str = "asap"
    namespace: str = "default"
    registry: str = ""
    claim: str = "asap-models"
    """Volume of weights."""
    gpus: int = 1
    replicas: int = 1
    blob_settings: Mapping[str, str] = field(default_factory=dict)
    """Of a store that the weights come from, by variable."""
    blobs_secret: str | None = None
    """Secret with the store's keys, by variable; None: the pod's role has them."""

    @property
    def label(self) -> str:
        """The model's name as a part of names of objects. Raises InvalidInput."""
        name = re.sub(r"[^a-z0-9-]+", "-", self.model.lower()).strip("-")
        if not _LABEL.fullmatch(name):
            raise InvalidInput(
                f"{self.model!r} is no name for an object of a cluster; name a short one that "
                "begins with a letter, with --name"
            )
        return name

    @property
    def folder(self) -> str:
        """Of the weights, in the volume: of the same source, revision and hash it is the same."""
        stem = re.sub(r"[/.]", "-", self.source.replace("://", "-")).lower()[:_FOLDER_CHARS]
        facts = f"{self.source} {self.revision} {self.sha256}"
        return f"/models/{stem}-{hashlib.sha256(facts.encode()).hexdigest()[:_HASH_CHARS]}"

    @property
    def url(self) -> str:
        """Where the cluster reaches it."""
        return f"http://{self.instance}-serving-{self.label}.{self.namespace}:8000"


def render_manifest(served: ServedModel) -> str:
    """Deployment and Service as YAML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # every value is written as JSON
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    prefix = f"{served.registry.rstrip('/')}/" if served.registry else ""
    text = environment.get_template("serving.yaml.j2").render(
        **asdict(served),
        object=f"{served.instance}-serving-{served.label}",
        component=f"serving-{served.label}",
        folder=served.folder,
        image=f"{prefix}asap-vllm:{served.version}",
        light_image=f"{prefix}asap:{served.version}",
        blob_secrets=BLOB_SECRETS if served.blobs_secret else (),
    )
    return "\n".join(line for line in text.splitlines() if line.strip()) + "\n"
