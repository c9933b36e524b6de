"""One look at a Deployment and its pods, by objects as the client reads them."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest

from asap_cli.rollout import RESTARTS, REVISION, TEMPLATE, Rollout, current_pods, judge


def read(kind, body):
    from kubernetes import client

    return client.ApiClient().deserialize(SimpleNamespace(data=json.dumps(body)), f"V1{kind}")


DEPLOYMENT = {
    "metadata": {"name": "one", "generation": 2, "annotations": {REVISION: "2"}},
    "spec": {"replicas": 2, "selector": {}, "template": {}},
    "status": {
        "observedGeneration": 2, "replicas": 2, "updatedReplicas": 2, "availableReplicas": 2,
    },
}  # fmt: skip


def deployment(**status):
    body = copy.deepcopy(DEPLOYMENT)
    body["status"] |= status
    return read("Deployment", body)


def container(state, *, name="vllm", restarts=0, last=None):
    return {
        "name": name, "image": "vllm:1", "imageID": "", "ready": False,
        "restartCount": restarts, "state": state, "lastState": last or {},
    }  # fmt: skip


def pod(name="a", template="2", *, metadata=None, **status):
    labels = {TEMPLATE: template}
    return read(
        "Pod",
        {
            "metadata": {"name": name, "labels": labels, **(metadata or {})},
            "status": {"phase": "Pending", **status},
        },
    )


def ready_pod(name):
    return pod(name, phase="Running", conditions=[{"type": "Ready", "status": "True"}])


def waiting(reason, **more):
    return {"waiting": {"reason": reason, **more}}


CRASHED = {"terminated": {"exitCode": 1, "reason": "Error"}}


def test_all_pods_of_the_newest_template_are_ready():
    assert judge(deployment(), []) == Rollout(True, "2 of 2 pods ready")


@pytest.mark.parametrize(
    "status",
    [
        {"observedGeneration": 1},
        {"updatedReplicas": 1},
        {"updatedReplicas": None},
        {"replicas": 3},
        {"availableReplicas": 1},
        {"availableReplicas": None},
    ],
)
def test_what_is_not_done_is_not_ready(status):
    assert not judge(deployment(**status), [ready_pod("a"), ready_pod("b")]).ready


def test_troubles_are_counted():
    pods = [ready_pod("a"), pod("b"), pod("c"), pod("d", phase="Failed", reason="Evicted")]
    text = judge(deployment(availableReplicas=1), pods).text
    assert text == "1 of 2 pods ready; 1 evicted; 2 starting"


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ({"containerStatuses": [container(waiting("ContainerCreating"))]}, "starting"),
        ({"containerStatuses": [container({"running": {}})]}, "starting"),
        ({"containerStatuses": [container(waiting("ErrImagePull"))]}, "cannot pull vllm:1"),
        ({"containerStatuses": [container(waiting("ImagePullBackOff"))]}, "cannot pull vllm:1"),
        (
            {
                "initContainerStatuses": [
                    container(waiting("CrashLoopBackOff"), name="weights", last=CRASHED)
                ],
                "containerStatuses": [container(waiting("PodInitializing"))],
            },
            "restarting: weights ended with code 1 (Error)",
        ),
        (
            {"containerStatuses": [container({"running": {}}, last=CRASHED)]},
            "restarting: vllm ended with code 1 (Error)",
        ),
        (
            {
                "initContainerStatuses": [
                    {**container({"terminated": {"exitCode": 0}}, last=CRASHED), "ready": True}
                ],
                "containerStatuses": [container({"running": {}})],
            },
            "starting",
        ),
        ({"phase": "Failed"}, "failed"),
        ({"reason": "NodeLost", "phase": "Running"}, "evicted"),
    ],
)
def test_a_trouble_has_a_name(status, words):
    found = judge(deployment(availableReplicas=1), [pod(**status)])
    assert found == Rollout(False, f"0 of 2 pods ready; 1 {words}")


@pytest.mark.parametrize("part", ["initContainerStatuses", "containerStatuses"])
def test_a_container_that_ends_again_and_again_is_hopeless(part):
    for restarts in (RESTARTS - 1, RESTARTS):
        one = container(waiting("CrashLoopBackOff"), restarts=restarts, last=CRASHED)
        found = judge(deployment(availableReplicas=1), [pod(**{part: [one]})])
        assert found.hopeless is (restarts == RESTARTS)
    one = container({"running": {}}, restarts=RESTARTS, last=CRASHED)
    assert not judge(deployment(availableReplicas=1), [pod(**{part: [one]})]).hopeless


def test_pods_of_an_earlier_template_and_those_that_end_are_not_looked_at():
    def replica_set(revision):
        return read(
            "ReplicaSet",
            {
                "metadata": {
                    "name": revision,
                    "labels": {TEMPLATE: revision},
                    "annotations": {REVISION: revision},
                },
                "status": {"replicas": 1},
            },
        )

    told_to_end = {"deletionTimestamp": "2026-01-01T00:00:00Z"}
    pods = [pod("old", "1"), pod("new", "2"), pod("ends", "2", metadata=told_to_end)]
    sets = [replica_set("1"), replica_set("2")]
    assert [one.metadata.name for one in current_pods(deployment(), sets, pods)] == ["new"]
    assert current_pods(deployment(), sets[:1], pods) == []
