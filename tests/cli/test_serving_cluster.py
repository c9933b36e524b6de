"""What a cluster does to a served model: conflicts, refusals, lost watches, evictions, outages."""

from __future__ import annotations

import asyncio
import copy
import json
import sys

import pytest
import yaml

from asap.errors import (
    CapacityError,
    Conflict,
    Forbidden,
    Misconfigured,
    NotFound,
    UpstreamUnavailable,
)
from asap_cli import serving_cluster
from asap_cli.serving_cluster import ServingCluster
from asap_cli.serving_manifest import ServedModel, render_manifest
from kubernetes_deployments import NO_NODE, QUOTA
from kubernetes_server import Fault, KubernetesServer
from waiting import PATIENCE_S, until

NAME = "asap-serving-one"
BOTH = pytest.mark.parametrize("plural", ["deployments", "services"])


def objects(**fields):
    """Deployment and Service of a model."""
    facts = {"source": "org/one", "version": "0.1.0", "namespace": "models", "replicas": 2}
    return list(yaml.safe_load_all(render_manifest(ServedModel("one", **facts | fields))))


@pytest.fixture
async def cluster(tmp_path, monkeypatch):
    monkeypatch.setattr(serving_cluster, "PAUSE_S", 0.02)
    monkeypatch.setattr(serving_cluster, "LOOK_S", 1)
    monkeypatch.setattr(serving_cluster, "TIMEOUT_S", (PATIENCE_S, PATIENCE_S))
    async with KubernetesServer(tmp_path / "cluster") as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
        yield cluster


class User:
    """Who deploys; `told` is what they read."""

    def __init__(self, timeout_s=PATIENCE_S):
        self.told: list[str] = []
        self._timeout_s = timeout_s

    def _serving(self):
        return ServingCluster(context=None, timeout_s=self._timeout_s, say=self.told.append)

    async def deploys(self, **fields):
        def work():
            deployment, service = objects(**fields)
            serving = self._serving()
            serving.apply(deployment, service)
            serving.wait(deployment)

        await asyncio.to_thread(work)

    async def removes(self):
        deployment, service = objects()
        await asyncio.to_thread(lambda: self._serving().remove(service, deployment))

    def begins(self, **fields):
        return asyncio.create_task(self.deploys(**fields))

    async def reads(self, words, work):
        """Wait until the words are told, while the work goes on."""
        while not any(words in line for line in self.told):
            assert not work.done(), self.told
            await asyncio.sleep(0.01)


@pytest.fixture
def user(cluster):
    return User()


def deployment_in(cluster):
    return cluster.objects["deployments", NAME]


def asked(cluster, *methods):
    return [call for call in cluster.calls if call[0] in methods]


async def test_a_model_is_made_and_followed_until_it_is_ready(cluster, user):
    await user.deploys()
    assert user.told[:2] == [f"Deployment {NAME}: created", f"Service {NAME}: created"]
    assert user.told[-1] == "2 of 2 pods ready"
    assert len(cluster.deployments.pods()) == 2
    assert cluster.named("services") == [NAME]


async def test_once_more_changes_nothing(cluster, user):
    await user.deploys()
    before, pods = copy.deepcopy(deployment_in(cluster)), cluster.deployments.pods()
    user.told.clear()
    await user.deploys()
    assert user.told == [
        f"Deployment {NAME}: unchanged", f"Service {NAME}: unchanged", "2 of 2 pods ready",
    ]  # fmt: skip
    assert deployment_in(cluster) == before
    assert cluster.deployments.pods() == pods


async def test_another_version_takes_the_place_of_the_first(cluster, user):
    await user.deploys()
    pods = cluster.deployments.pods()
    await user.deploys(source="org/two")
    assert f"Deployment {NAME}: changed" in user.told
    assert deployment_in(cluster)["metadata"]["generation"] == 2
    assert len(cluster.deployments.pods()) == 2
    assert not {*pods} & {*cluster.deployments.pods()}


async def test_no_pods_are_ready_at_once(cluster, user):
    await user.deploys(replicas=0)
    assert user.told[-1] == "0 of 0 pods ready"


async def test_what_others_have_added_stays(cluster, user):
    await user.deploys()
    kept, service = deployment_in(cluster), cluster.objects["services", NAME]
    kept["metadata"]["annotations"]["team"] = "search"
    again = {"kubectl.kubernetes.io/restartedAt": "2026-01-01T00:00:00Z"}
    kept["spec"]["template"]["metadata"]["annotations"] = again
    kept["spec"]["replicas"] = 5
    service["spec"]["clusterIP"] = "10.0.0.7"
    await user.deploys()
    assert kept["metadata"]["annotations"]["team"] == "search"
    assert kept["spec"]["template"]["metadata"]["annotations"] == again
    assert kept["spec"]["replicas"] == 2
    assert service["spec"]["clusterIP"] == "10.0.0.7"


@BOTH
async def test_a_change_at_the_same_moment_is_not_lost(cluster, user, plural):
    await user.deploys()

    async def label():
        cluster.objects[plural, NAME]["metadata"]["labels"]["team"] = "search"
        await cluster.touch(plural, NAME)

    cluster.faults.append(Fault("PUT", plural, None, first=label))
    await user.deploys(source="org/two")
    assert cluster.faults == []
    assert len([call for call in asked(cluster, "PUT") if call[1] == plural]) == 2
    assert cluster.objects[plural, NAME]["metadata"]["labels"]["team"] == "search"
    assert "/models/org-two" in json.dumps(deployment_in(cluster)["spec"])


@BOTH
async def test_who_makes_it_a_moment_earlier_is_joined_when_it_is_ours(cluster, user, plural):
    [body] = [one for one in objects() if one["kind"].lower() + "s" == plural]

    async def make():
        await cluster.create(plural, body)

    cluster.faults.append(Fault("POST", plural, None, first=make))
    await user.deploys()
    assert cluster.faults == []
    assert any("unchanged" in line for line in user.told)
    assert user.told[-1] == "2 of 2 pods ready"


async def test_who_makes_it_a_moment_earlier_is_left_alone_when_it_is_not(cluster, user):
    [body, _] = objects()
    body["metadata"]["labels"] = {"app": "another"}

    async def make():
        await cluster.create("deployments", body)

    cluster.faults.append(Fault("POST", "deployments", None, first=make))
    with pytest.raises(Conflict, match="somebody else's"):
        await user.deploys()
    assert deployment_in(cluster)["metadata"]["labels"] == {"app": "another"}
    assert asked(cluster, "PUT") == []


@BOTH
@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (None, "somebody else's"),
        ({"app.kubernetes.io/instance": "staging"}, "somebody else's"),
        ({"app.kubernetes.io/managed-by": "Helm"}, "a release of the chart"),
    ],
)
async def test_the_object_of_somebody_else_is_refused(cluster, user, plural, labels, words):
    [body] = [one for one in objects() if one["kind"].lower() + "s" == plural]
    body["metadata"]["labels"] = labels and body["metadata"]["labels"] | labels
    if labels is None:
        del body["metadata"]["labels"]
    await cluster.create(plural, body)
    kept = copy.deepcopy(body["spec"])
    for work in (user.deploys, user.removes):
        with pytest.raises(Conflict, match=words):
            await work()
    assert asked(cluster, "POST", "PUT", "DELETE") == []
    assert cluster.objects[plural, NAME]["spec"] == kept


async def test_a_full_quota_of_deployments_is_said(cluster, user):
    words = 'deployments.apps "x" is forbidden: exceeded quota: few, used: count/deployments=3'
    cluster.faults.append(Fault("POST", "deployments", 403, words))
    with pytest.raises(CapacityError, match="exceeded quota: few") as error:
        await user.deploys()
    assert error.value.problem_code == "quota-refused"
    assert cluster.named("services") == []


async def test_pods_that_the_quota_refuses_are_waited_for(cluster, user):
    cluster.deployments.quota = 1
    work = user.begins()
    await user.reads(QUOTA.split("{}")[1], work)
    assert user.told[-1].startswith("1 of 2 pods ready; the cluster refuses pods: ")
    cluster.deployments.quota = None
    await cluster.touch("deployments", NAME)
    await work
    assert user.told[-1] == "2 of 2 pods ready"


@pytest.mark.parametrize(
    ("played", "words"),
    [
        ("starting", "0 of 2 pods ready; 2 starting"),
        ("unschedulable", f"2 without a node: {NO_NODE}"),
        ("no-image", "2 cannot pull asap-vllm:0.1.0"),
        ("no-secret", '2 waiting: CreateContainerConfigError secret "keys" not found'),
        ("crashed", "2 restarting: vllm ended with code 137 (OOMKilled)"),
    ],
)
async def test_what_keeps_pods_from_being_ready_is_told_once(cluster, user, played, words):
    cluster.deployments.played = played
    work = user.begins()
    await user.reads(words, work)
    looks = len(asked(cluster, "WATCH"))
    await until(lambda: len(asked(cluster, "WATCH")) >= looks + 2)
    assert len([line for line in user.told if words in line]) == 1
    await cluster.deployments.play("ready")
    await work
    assert user.told[-1] == "2 of 2 pods ready"


async def test_a_server_that_ends_again_and_again_is_given_up(cluster, user):
    cluster.deployments.played = "crashing"
    with pytest.raises(UpstreamUnavailable, match=r"vllm ended with code 137 \(OOMKilled\)"):
        await user.deploys()
    await cluster.deployments.play("ready")
    await user.deploys()


async def test_an_evicted_pod_is_replaced(cluster, user):
    cluster.deployments.played = "starting"
    work = user.begins()
    await user.reads("2 starting", work)
    lost = cluster.deployments.pods()[0]
    await cluster.deployments.evict(lost)
    await user.reads("1 evicted; 2 starting", work)
    await cluster.deployments.play("ready")
    await work
    assert lost in cluster.named("pods"), "the cluster keeps it to be looked at"
    assert lost not in cluster.deployments.pods()
    assert user.told[-1] == "2 of 2 pods ready"


async def test_a_watch_that_breaks_is_taken_up_again(cluster, user, monkeypatch):
    monkeypatch.setattr(serving_cluster, "LOOK_S", 600)
    cluster.deployments.played = "starting"
    work = user.begins()
    await user.reads("2 starting", work)
    for _ in range(3):
        await until(lambda: cluster.watches)
        cluster.drop_watches()
    await until(lambda: cluster.watches)
    await cluster.deployments.play("ready")
    await work


@pytest.mark.parametrize("status", [410, None])
async def test_a_watch_from_too_long_ago_begins_anew(cluster, user, monkeypatch, status):
    """Both as an answer, and as an event of a stream that began well."""
    monkeypatch.setattr(serving_cluster, "LOOK_S", 600)
    cluster.deployments.played = "starting"

    async def forget():
        cluster.forget_versions()

    cluster.faults.append(Fault("WATCH", "deployments", status, first=forget))
    work = user.begins()
    await until(lambda: len(asked(cluster, "WATCH")) == 2 and cluster.watches)
    await cluster.deployments.play("ready")
    await work
    assert user.told[-1] == "2 of 2 pods ready"


@pytest.mark.parametrize("status", [0, 429, 500, 503])
async def test_trouble_of_the_api_is_waited_out(cluster, user, status):
    faults = [
        ("GET", "deployments"), ("POST", "deployments"), ("POST", "services"),
        ("WATCH", "deployments"), ("GET", "pods"), ("GET", "replicasets"),
    ]  # fmt: skip
    cluster.deployments.played = "starting"
    cluster.faults += [Fault(*which, status) for which in faults]
    work = user.begins()
    await user.reads("2 starting", work)
    await cluster.deployments.play("ready")
    await work
    assert cluster.faults == []
    assert any(line.endswith("trying again") for line in user.told)


@pytest.mark.parametrize("method", ["POST", "PUT"])
async def test_a_change_whose_answer_is_lost_is_made_once(cluster, user, method):
    if method == "PUT":
        await user.deploys(source="org/two")
    cluster.faults.append(Fault(method, "deployments", 0, after=True))
    await user.deploys()
    assert cluster.faults == []
    assert deployment_in(cluster)["metadata"]["generation"] == (1 if method == "POST" else 2)


async def test_an_api_that_is_away_for_a_while_is_waited_for(cluster, user):
    cluster.deployments.played = "starting"
    work = user.begins()
    await user.reads("2 starting", work)
    cluster.leave()
    await user.reads("cannot be reached; trying again", work)
    await cluster.deployments.play("ready")
    cluster.come_back()
    await work
    assert user.told[-1] == "2 of 2 pods ready"


async def test_an_api_that_stays_away_is_given_up(cluster):
    cluster.leave()
    with pytest.raises(CapacityError) as error:
        await User(timeout_s=0.2).deploys()
    assert error.value.problem_code == "cluster-unavailable"


@pytest.mark.parametrize("status", [401, 403])
async def test_no_access_is_said_at_once(cluster, user, status):
    words = 'deployments.apps is forbidden: User "me" cannot get resource "deployments"'
    cluster.faults.append(Fault("GET", "deployments", status, words))
    with pytest.raises(Forbidden, match='User "me" cannot get'):
        await user.deploys()
    assert len(cluster.calls) == 1


async def test_an_invalid_object_is_said_at_once(cluster, user):
    with pytest.raises(Misconfigured, match="invalid"):
        await user.deploys(gpus=1, claim={"a": 1})
    assert cluster.named("deployments") == []


async def test_no_namespace_is_said_at_once(cluster, user):
    cluster.faults.append(Fault("POST", "deployments", 404, 'namespaces "models" not found'))
    with pytest.raises(NotFound, match='namespaces "models" not found'):
        await user.deploys()


async def test_what_is_not_ready_in_time_says_why(cluster, user, monkeypatch):
    def left_s(serving):
        return -1.0 if any("without a node" in line for line in user.told) else PATIENCE_S

    monkeypatch.setattr(ServingCluster, "_left_s", left_s)
    cluster.deployments.played = "unschedulable"
    with pytest.raises(CapacityError, match="Insufficient nvidia") as error:
        await user.deploys()
    assert error.value.problem_code == "rollout-incomplete"
    assert cluster.named("deployments") == [NAME], "it goes on without us"


async def test_a_model_that_somebody_changes_meanwhile_is_not_called_ready(cluster, user):
    cluster.deployments.played = "starting"
    work = user.begins()
    await user.reads("2 starting", work)
    other = User()
    instead = other.begins(source="org/two")
    with pytest.raises(Conflict, match="somebody else has changed"):
        await work
    await cluster.deployments.play("ready")
    await instead


async def test_a_model_that_somebody_removes_meanwhile_is_not_waited_for(cluster, user):
    cluster.deployments.played = "starting"
    work = user.begins()
    await user.reads("2 starting", work)
    await until(lambda: cluster.watches)
    await User().removes()
    with pytest.raises(NotFound, match="somebody else has removed"):
        await work


async def test_removing_takes_the_pods_along_and_can_be_repeated(cluster, user):
    await user.deploys()
    await user.removes()
    for plural in ("deployments", "replicasets", "pods", "services"):
        assert cluster.named(plural) == []
    assert user.told[-2:] == [f"Service {NAME}: removed", f"Deployment {NAME}: removed"]
    await user.removes()
    assert user.told[-1] == f"Deployment {NAME}: was not there"


async def test_what_is_made_anew_during_the_removal_stays(cluster, user):
    await user.deploys()

    async def anew():
        await cluster.remove("deployments", NAME)
        await cluster.create("deployments", objects()[0])

    cluster.faults.append(Fault("DELETE", "deployments", None, first=anew))
    with pytest.raises(Conflict):
        await user.removes()
    assert cluster.named("deployments") == [NAME]


async def test_what_is_still_being_deleted_is_waited_for(cluster, user):
    await user.deploys()
    deployment_in(cluster)["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    before = deployment_in(cluster)["metadata"]["uid"]
    work = user.begins()
    await user.reads("is being deleted; trying again", work)
    await cluster.remove("deployments", NAME)
    await work
    assert deployment_in(cluster)["metadata"]["uid"] != before


@pytest.mark.parametrize(("file", "context"), [("missing", None), (None, "other")])
async def test_a_cluster_that_is_not_configured_is_said_so(
    cluster, tmp_path, monkeypatch, file, context
):
    if file:
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / file))
    with pytest.raises(Misconfigured, match="KUBECONFIG"):
        ServingCluster(context=context, timeout_s=1, say=print)


def test_a_client_that_is_not_installed_is_said_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(Misconfigured, match="extra 'kubernetes'"):
        ServingCluster(context=None, timeout_s=1, say=print)
