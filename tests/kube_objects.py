"""Rendered objects as a whole: pods, containers, selectors, quantities, and who refers to whom."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

SCALE = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12,
         "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}  # fmt: skip


@dataclass
class Rendered:
    """All objects of a release, and what it may refer to outside of itself."""

    objects: list[dict]
    external: set[str] = field(default_factory=set)
    """Names of Secrets, ConfigMaps and claims that somebody else makes."""
    digests: bool = False
    """Whether images must be named by digest."""
    namespaces_level: bool = False
    """Whether grading pods have the documented exception to "restricted"."""

    def of(self, *kinds):
        return [one for one in self.objects if one["kind"] in kinds]

    def workloads(self):
        """Objects that make pods, each with its pod's template."""
        for one in self.of("Deployment", "StatefulSet", "DaemonSet", "Job"):
            yield one, one["spec"]["template"]
        for one in self.of("Pod"):
            yield one, one

    def pods(self):
        """(name, labels, pod spec) of everything that runs."""
        for one, template in self.workloads():
            yield label(one), template["metadata"]["labels"], template["spec"]

    def containers(self):
        """(name, pod spec, container, whether it is an init container)."""
        for name, labels, pod in self.pods():
            for key in ("initContainers", "containers"):
                for container in pod.get(key, []):
                    where = f"{name}/{container['name']}"
                    yield where, labels, pod, container, key == "initContainers"


def label(one):
    return f"{one['kind']} {one['metadata']['name']}"


def amount(text):
    """A quantity as a number. Raises ValueError for what is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(m|k|[KMGT]i?|)", str(text))
    if found is None:
        raise ValueError(f"{text!r} is no quantity")
    return float(found[1]) * SCALE[found[2]]


def selects(selector, labels):
    """A label selector of the API, or the plain map of a Service."""
    if not {"matchLabels", "matchExpressions"} & set(selector):
        selector = {"matchLabels": selector}
    wanted = selector.get("matchLabels", {})
    inside = all(labels.get(key) == value for key, value in wanted.items())
    return inside and all(
        labels.get(one["key"]) in one["values"] for one in selector.get("matchExpressions", [])
    )


def referred(all_):
    """(kind, name, whose) of every reference by name in an object."""
    for name, _, pod in all_.pods():
        yield from ((*one, name) for one in _of_pod(pod))
        for volume in pod.get("volumes", []):
            yield from ((*one, name) for one in _of_volume(volume))
    for where, _, _, container, _ in all_.containers():
        yield from ((*one, where) for one in _of_container(container))
    for kind, look in OTHERS.items():
        for one in all_.of(kind):
            yield from ((*found, label(one)) for found in look(one))


def _of_pod(pod):
    if account := pod.get("serviceAccountName"):
        yield "ServiceAccount", account
    if (priority := pod.get("priorityClassName")) is not None:
        yield "PriorityClass", priority
    for secret in pod.get("imagePullSecrets", []):
        yield "Secret", secret["name"]


def _of_volume(volume):
    if "persistentVolumeClaim" in volume:
        yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
    if "configMap" in volume:
        yield "ConfigMap", volume["configMap"]["name"]


def _of_container(container):
    for source in container.get("envFrom", []):
        for key, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
            if key in source:
                yield kind, source[key]["name"]
    for variable in container.get("env", []):
        if "valueFrom" in variable:
            yield "Secret", variable["valueFrom"]["secretKeyRef"]["name"]


def _of_binding(one):
    yield one["roleRef"]["kind"], one["roleRef"]["name"]
    for subject in one["subjects"]:
        yield subject["kind"], subject["name"]


def _of_scaler(one):
    yield "Deployment", one["spec"]["scaleTargetRef"]["name"]
    for trigger in one["spec"].get("triggers", []):
        if reference := trigger.get("authenticationRef"):
            yield "TriggerAuthentication", reference["name"]


def _of_authentication(one):
    return (("Secret", secret["name"]) for secret in one["spec"]["secretTargetRef"])


def _of_ingress(one):
    for rule in one["spec"]["rules"]:
        for path in rule["http"]["paths"]:
            yield "Service", path["backend"]["service"]["name"]
    for tls in one["spec"].get("tls", []):
        yield "Secret", tls["secretName"]


def _of_route(one):
    for rule in one["spec"]["rules"]:
        yield from (("Service", reference["name"]) for reference in rule["backendRefs"])


def _of_monitor(one):
    for end in one["spec"]["endpoints"]:
        if "authorization" in end:
            yield "Secret", end["authorization"]["credentials"]["name"]


OTHERS = {
    "RoleBinding": _of_binding,
    "HorizontalPodAutoscaler": _of_scaler,
    "ScaledObject": _of_scaler,
    "TriggerAuthentication": _of_authentication,
    "Ingress": _of_ingress,
    "HTTPRoute": _of_route,
    "ServiceMonitor": _of_monitor,
}
