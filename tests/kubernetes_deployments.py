"""What a cluster does with Deployments: ReplicaSets, pods in their place, and how they fare.

No process runs. What becomes of pods is what the test says: `play`, `evict`, `quota`.
"""

from __future__ import annotations

import hashlib
import json
import uuid

REVISION, TEMPLATE = "deployment.kubernetes.io/revision", "pod-template-hash"
QUOTA = (
    'pods "{}" is forbidden: exceeded quota: gpus, requested: requests.nvidia.com/gpu=1, '
    "used: requests.nvidia.com/gpu=8, limited: requests.nvidia.com/gpu=8"
)
NO_NODE = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."


def _true(kind, value=True, **more):
    return {"type": kind, "status": "True" if value else "False", **more}


def _crashed(times):
    return {
        "waiting": {"reason": "CrashLoopBackOff", "message": f"back-off after {times}"},
    }, {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}


PLAYED = {
    "ready": ("Running", [_true("PodScheduled"), _true("Ready")], {"running": {}}, {}, 0),
    "starting": (
        "Pending",
        [_true("PodScheduled"), _true("Ready", False)],
        {"waiting": {"reason": "PodInitializing"}},
        {},
        0,
    ),
    "unschedulable": (
        "Pending",
        [_true("PodScheduled", False, reason="Unschedulable", message=NO_NODE)],
        None,
        {},
        0,
    ),
    "no-image": (
        "Pending",
        [_true("PodScheduled"), _true("Ready", False)],
        {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}},
        {},
        0,
    ),
    "no-secret": (
        "Pending",
        [_true("PodScheduled"), _true("Ready", False)],
        {"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "keys" not found'}},
        {},
        0,
    ),
    "crashed": ("Running", [_true("PodScheduled"), _true("Ready", False)], *_crashed(1), 1),
    "crashing": ("Running", [_true("PodScheduled"), _true("Ready", False)], *_crashed(3), 3),
}
"""Phase, conditions, and of the server's container: state, last state, restarts."""


class DeploymentController:
    """Carries out Deployments that replace pods one by one, without one too many."""

    def __init__(self, server):
        self._server = server
        self.quota: int | None = None
        """Most pods that the namespace may have."""
        self.played = "ready"
        """What becomes of pods: one of PLAYED."""

    async def play(self, played):
        """From now on this becomes of pods, of those that are there, too."""
        self.played = played
        for pod in self._pods():
            self._set(pod)
            await self._server.touch("pods", pod["metadata"]["name"])

    async def evict(self, pod):
        """The node needs its room: the pod has failed, and stays to be looked at."""
        body = self._server.objects["pods", pod]
        body["status"] = {
            "phase": "Failed",
            "reason": "Evicted",
            "conditions": [_true("DisruptionTarget", reason="TerminationByKubelet")],
        }
        await self._server.touch("pods", pod)

    def pods(self):
        """Names of the pods that have not failed, oldest first."""
        return [pod["metadata"]["name"] for pod in self._pods()]

    async def run(self, deployment):
        """As long as it is there, after each change of anything, its own changes, too."""
        while True:
            seen = self._server.version
            await self._step(deployment)
            await self._server.until(lambda: self._server.version > seen)  # noqa: B023

    async def _step(self, deployment):
        newest = await self._newest(deployment)
        old = [pod for pod in self._owned(deployment) if not _of(pod, newest)]
        wanted = deployment["spec"]["replicas"]
        for pod in [*old, *self._owned(newest)[wanted:]]:
            ready = [one for one in self._owned(deployment) if _ready(one)]
            if not _ready(pod) or len(ready) >= wanted:
                await self._server.remove("pods", pod["metadata"]["name"])
        refused = None
        while refused is None and len(self._owned(deployment)) < wanted:
            refused = await self._add_pod(newest)
        await self._report(deployment, newest, refused)

    async def _newest(self, deployment):
        """The ReplicaSet of the template, made when it is a new one."""
        template = deployment["spec"]["template"]
        digest = hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:10]
        name = f"{deployment['metadata']['name']}-{digest}"
        revisions = self._server.named("replicasets")
        if name not in revisions:
            revision = str(len(revisions) + 1)
            labels = template["metadata"]["labels"] | {TEMPLATE: digest}
            body = {
                "apiVersion": "apps/v1",
                "kind": "ReplicaSet",
                "metadata": {
                    "name": name,
                    "labels": labels,
                    "annotations": {REVISION: revision},
                    "ownerReferences": [_owner(deployment)],
                },
                "spec": {"selector": {"matchLabels": labels}, "template": template},
                "status": {"replicas": 0},
            }
            await self._server.add("replicasets", body)
        newest = self._server.objects["replicasets", name]
        revision = newest["metadata"]["annotations"][REVISION]
        annotations = deployment["metadata"].setdefault("annotations", {})
        if annotations.get(REVISION) != revision:
            annotations[REVISION] = revision
            await self._server.touch("deployments", deployment["metadata"]["name"])
        return newest

    async def _add_pod(self, replica_set):
        """Why there is no further pod."""
        name = f"{replica_set['metadata']['name']}-{uuid.uuid4().hex[:5]}"
        if self.quota is not None and len(self._pods()) >= self.quota:
            return QUOTA.format(name)
        template = replica_set["spec"]["template"]
        metadata = {
            "name": name,
            "labels": replica_set["metadata"]["labels"],
            "ownerReferences": [_owner(replica_set)],
        }
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
        self._set(pod)
        await self._server.add("pods", pod)
        return None

    async def _report(self, deployment, newest, refused):
        mine, current = self._owned(deployment), self._owned(newest)
        ready = sum(map(_ready, mine))
        conditions = [_true("Available", ready > 0)]
        if refused is not None:
            told = _true("ReplicaFailure", reason="FailedCreate", message=refused)
            before = deployment["status"].get("conditions", ())
            # The first message stays while there is one.
            conditions.append(next((one for one in before if one["type"] == told["type"]), told))
        status = {
            "observedGeneration": deployment["metadata"]["generation"],
            "replicas": len(mine),
            "updatedReplicas": len(current),
            "readyReplicas": ready,
            "availableReplicas": ready,
            "conditions": conditions,
        }
        if deployment["status"] != status:
            deployment["status"] = status
            await self._server.touch("deployments", deployment["metadata"]["name"])

    def _set(self, pod):
        phase, conditions, state, last, restarts = PLAYED[self.played]
        pod["status"] = {"phase": phase, "conditions": conditions}
        if state is not None:
            one = pod["spec"]["containers"][0]
            pod["status"]["containerStatuses"] = [
                {
                    "name": one["name"], "image": one["image"], "imageID": "",
                    "ready": self.played == "ready", "restartCount": restarts,
                    "state": state, "lastState": last,
                }
            ]  # fmt: skip

    def _pods(self):
        found = [
            pod
            for (kind, _), pod in self._server.objects.items()
            if kind == "pods" and pod["status"]["phase"] != "Failed"
        ]
        return sorted(found, key=lambda pod: int(pod["metadata"]["resourceVersion"]))

    def _owned(self, owner):
        """Pods of a ReplicaSet, or of all ReplicaSets of a Deployment."""
        uids = {owner["metadata"]["uid"]} | {
            one["metadata"]["uid"]
            for (kind, _), one in self._server.objects.items()
            if kind == "replicasets" and _of(one, owner)
        }
        return [
            pod
            for pod in self._pods()
            if any(one["uid"] in uids for one in pod["metadata"]["ownerReferences"])
        ]


def _owner(body):
    return {
        "apiVersion": body["apiVersion"],
        "kind": body["kind"],
        "name": body["metadata"]["name"],
        "uid": body["metadata"]["uid"],
        "controller": True,
    }


def _of(body, owner):
    return any(
        one["uid"] == owner["metadata"]["uid"] for one in body["metadata"]["ownerReferences"]
    )


def _ready(pod):
    return _true("Ready") in pod["status"].get("conditions", ())
