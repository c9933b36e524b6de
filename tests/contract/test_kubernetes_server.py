"""The test server of the Kubernetes API keeps what it promises to the real client."""

from __future__ import annotations

import asyncio
import json

import pytest

from asap_trainer.manifest import job_manifest
from kubernetes_server import KubernetesServer
from training_program import Program, cluster_settings, train_run
from waiting import until

SPACE = "training"


@pytest.fixture
async def cluster(tmp_path):
    program = Program.made(tmp_path / "program")
    program.end(0)
    async with KubernetesServer(tmp_path / "cluster", python=program.python) as cluster:
        yield cluster
    program.kill()


@pytest.fixture
def batch(cluster):
    from kubernetes import client, config

    configuration = client.Configuration()
    config.load_kube_config(str(cluster.kubeconfig), client_configuration=configuration)
    return client.BatchV1Api(client.ApiClient(configuration))


@pytest.fixture
def body(cluster, tmp_path):
    return job_manifest(train_run(), 0, cluster_settings(tmp_path, cluster.kubeconfig))


async def failed(function, *arguments, **options) -> int:
    from kubernetes.client.exceptions import ApiException

    with pytest.raises(ApiException) as error:
        await asyncio.to_thread(function, *arguments, **options)
    return error.value.status


async def test_a_watch_tells_a_job_from_its_creation_to_its_end(cluster, batch, body):
    from kubernetes import watch

    def seen():
        events = watch.Watch().stream(
            batch.list_namespaced_job, SPACE, timeout_seconds=240, resource_version="0"
        )
        for event in events:
            yield event["type"], [one.type for one in event["object"].status.conditions or ()]
            if event["object"].status.conditions:
                return

    watching = asyncio.create_task(asyncio.to_thread(lambda: list(seen())))
    await asyncio.to_thread(batch.create_namespaced_job, SPACE, body)
    events = await watching
    assert events[0] == ("ADDED", [])
    assert events[-1] == ("MODIFIED", ["Complete"])


async def test_a_watch_from_too_long_ago_is_refused(cluster, batch, body):
    from kubernetes import watch

    await asyncio.to_thread(batch.create_namespaced_job, SPACE, body)
    cluster.forget_versions()

    def stream(**options):
        return list(watch.Watch().stream(batch.list_namespaced_job, **options))

    assert await failed(stream, namespace=SPACE, resource_version="1", timeout_seconds=1) == 410


async def test_labels_select_and_pages_expire(cluster, batch, body):
    cluster.pods.scheduling = False
    for name in ("a", "b", "c"):
        one = json.loads(json.dumps(body))
        one["metadata"] |= {"name": name, "labels": {"team": name, "all": "yes"}}
        await asyncio.to_thread(batch.create_namespaced_job, SPACE, one)

    async def names(**options):
        found = await asyncio.to_thread(batch.list_namespaced_job, SPACE, **options)
        return [job.metadata.name for job in found.items], found.metadata._continue

    assert await names(label_selector="all=yes,team=b") == (["b"], None)
    assert await names(label_selector="team=d") == ([], None)
    first, more = await names(limit=2)
    assert (first, await names(limit=2, _continue=more)) == (["a", "b"], (["c"], None))
    cluster.forget_versions()
    assert await failed(batch.list_namespaced_job, SPACE, limit=2, _continue=more) == 410


async def test_objects_are_checked(cluster, batch, body):
    wrong = json.loads(json.dumps(body))
    wrong["spec"]["backofLimit"] = 0
    assert await failed(batch.create_namespaced_job, SPACE, wrong) == 422
    assert await failed(batch.read_namespaced_job, "missing", SPACE) == 404
    await asyncio.to_thread(batch.create_namespaced_job, SPACE, body)
    assert await failed(batch.create_namespaced_job, SPACE, body) == 409
    name = body["metadata"]["name"]
    kept = await asyncio.to_thread(batch.read_namespaced_job, name, SPACE)
    kept.status.ready = 1
    kept.metadata.resource_version = "1"
    await cluster.touch("jobs", name)
    assert await failed(batch.replace_namespaced_job_status, name, SPACE, kept) == 409
    kept.metadata.resource_version = None
    await asyncio.to_thread(batch.replace_namespaced_job_status, name, SPACE, kept)
    assert cluster.objects["jobs", name]["status"]["ready"] == 1


async def test_a_deletion_that_states_no_policy_leaves_the_pods(cluster, batch, body):
    name = body["metadata"]["name"]
    await asyncio.to_thread(batch.create_namespaced_job, SPACE, body)
    await cluster.until(lambda: cluster.objects["jobs", name]["status"].get("conditions"))
    await asyncio.to_thread(batch.delete_namespaced_job, name, SPACE)
    assert cluster.named("jobs") == []
    assert len(cluster.named("pods")) == 1


async def test_a_change_has_a_generation_and_no_change_has_no_version(cluster, batch, body):
    cluster.pods.scheduling = False
    name = body["metadata"]["name"]
    await asyncio.to_thread(batch.create_namespaced_job, SPACE, body)
    await cluster.until(lambda: cluster.named("pods"))
    kept = await asyncio.to_thread(batch.read_namespaced_job, name, SPACE)
    same = await asyncio.to_thread(batch.replace_namespaced_job, name, SPACE, kept)
    assert same.metadata.resource_version == kept.metadata.resource_version
    kept.spec.backoff_limit, kept.metadata.uid = 5, "planted"
    changed = await asyncio.to_thread(batch.replace_namespaced_job, name, SPACE, kept)
    assert (same.metadata.generation, changed.metadata.generation) == (1, 2)
    assert changed.metadata.uid == same.metadata.uid
    assert await failed(batch.replace_namespaced_job, name, SPACE, kept) == 409


async def test_only_the_object_that_is_meant_is_deleted(cluster, batch, body):
    name = body["metadata"]["name"]
    await asyncio.to_thread(batch.create_namespaced_job, SPACE, body)
    another = {"preconditions": {"uid": "another"}}
    assert await failed(batch.delete_namespaced_job, name, SPACE, body=another) == 409
    assert cluster.named("jobs") == [name]


async def test_a_watch_breaks_in_the_middle(cluster, batch):
    from kubernetes import watch
    from urllib3.exceptions import ProtocolError

    def follow():
        return list(watch.Watch().stream(batch.list_namespaced_job, SPACE, timeout_seconds=60))

    watching = asyncio.create_task(asyncio.to_thread(follow))
    await until(lambda: cluster.watches)
    cluster.drop_watches()
    with pytest.raises(ProtocolError):
        await watching
