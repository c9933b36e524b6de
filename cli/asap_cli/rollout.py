"""How far a Deployment has come, and what keeps its pods from being ready, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from asap_runtime.kubernetes_api import conditions, is_lost

__all__ = ["REVISION", "TEMPLATE", "Rollout", "current_pods", "judge"]

REVISION = "deployment.kubernetes.io/revision"
TEMPLATE = "pod-template-hash"
RESTARTS = 3
"""Of one container: after so many it does not get well by waiting."""
_STARTING = frozenset({"ContainerCreating", "PodInitializing"})
_NO_IMAGE = frozenset({"ErrImagePull", "ImagePullBackOff"})


@dataclass(frozen=True, slots=True)
class Rollout:
    """One look. `hopeless`: what the pods run ends again and again."""

    ready: bool
    text: str
    hopeless: bool = False


def judge(deployment: Any, pods: Sequence[Any]) -> Rollout:
    """The state of a Deployment whose newest pods are `pods`; objects as the client reads them."""
    status, wanted = deployment.status, deployment.spec.replicas
    if (status.observed_generation or 0) < deployment.metadata.generation:
        return Rollout(False, "the cluster has not taken notice yet")
    updated, available = status.updated_replicas or 0, status.available_replicas or 0
    if updated >= wanted and (status.replicas or 0) == updated == available:
        return Rollout(True, f"{available} of {wanted} pods ready")
    ready = sum("Ready" in conditions(pod.status) for pod in pods)
    parts = [f"{ready} of {wanted} pods ready"]
    if refusal := conditions(status).get("ReplicaFailure"):
        parts.append(f"the cluster refuses pods: {refusal.message}")
    troubles = Counter(trouble for pod in pods if (trouble := _trouble(pod)))
    parts += [f"{count} {trouble}" for trouble, count in sorted(troubles.items())]
    return Rollout(False, "; ".join(parts), hopeless=any(map(_is_hopeless, pods)))


def current_pods(deployment: Any, replica_sets: Sequence[Any], pods: Sequence[Any]) -> list[Any]:
    """The pods that have the Deployment's newest template, without those that are being deleted."""
    revision = (deployment.metadata.annotations or {}).get(REVISION)
    newest = {
        one.metadata.labels[TEMPLATE]
        for one in replica_sets
        if (one.metadata.annotations or {}).get(REVISION) == revision
    }
    return [
        pod
        for pod in pods
        if pod.metadata.labels.get(TEMPLATE) in newest and pod.metadata.deletion_timestamp is None
    ]


def _containers(pod: Any) -> Iterator[Any]:
    yield from pod.status.init_container_statuses or ()
    yield from pod.status.container_statuses or ()


def _trouble(pod: Any) -> str | None:
    """What keeps the pod from being ready; the same words for the same trouble."""
    if is_lost(pod):
        return "evicted"
    if pod.status.phase == "Failed":
        return "failed"
    if "Ready" in conditions(pod.status):
        return None
    for condition in pod.status.conditions or ():
        if (condition.type, condition.status) == ("PodScheduled", "False"):
            return f"without a node: {condition.message or condition.reason}"
    return next(filter(None, map(_container_trouble, _containers(pod))), "starting")


def _container_trouble(container: Any) -> str | None:
    if container.ready:  # also one that had to end, and has, whatever went wrong before
        return None
    waiting = container.state.waiting
    if waiting is not None and waiting.reason in _NO_IMAGE:
        return f"cannot pull {container.image}"
    ended = container.last_state.terminated if container.last_state else None
    if ended is not None:
        return f"restarting: {container.name} ended with code {ended.exit_code} ({ended.reason})"
    if waiting is not None and waiting.reason not in _STARTING:
        # The text of other reasons names what is missing, such as a Secret.
        return f"waiting: {waiting.reason} {waiting.message or ''}".rstrip()
    return None


def _is_hopeless(pod: Any) -> bool:
    return any(
        container.state.waiting is not None
        and container.state.waiting.reason == "CrashLoopBackOff"
        and container.restart_count >= RESTARTS
        for container in _containers(pod)
    )
