from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import dataclass

import kubernetes_validate
import pytest
import yaml

from helm_chart import ANYWHERE, NAMESPACE, changed, named, render
from kubernetes_server import KubernetesServer

VERSIONS = [f"1.{minor}" for minor in range(29, 38)]
BY_HELM = {
    "app.kubernetes.io/version", "app.kubernetes.io/managed-by", "helm.sh/chart",
    "annotations", "serviceAccountName",
}  # fmt: skip
"""What only a release of the chart has."""


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("ASAP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ASAP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "missing"))
    monkeypatch.chdir(tmp_path)


@dataclass(frozen=True)
class Ended:
    code: int
    err: str


@pytest.fixture
async def cluster(tmp_path):
    async with KubernetesServer(tmp_path / "cluster") as cluster:
        yield cluster


@pytest.fixture
def asap_process(cluster, monkeypatch):
    """Run `asap ARGS` as a user of the cluster."""
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))

    async def run(*arguments):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "asap_cli.main", *arguments, stderr=asyncio.subprocess.PIPE
        )
        _, err = await process.communicate()
        return Ended(process.returncode, err.decode())

    return run


@pytest.mark.slow
async def test_a_model_comes_into_the_cluster_and_leaves_it(cluster, asap_process):
    model = ("deploy", "org/Model-One", "--kubernetes", "--namespace", "models")
    ran = await asap_process(*model, "--replicas", "2", "--context", "test")
    assert ran.code == 0, ran.err
    assert len(cluster.deployments.pods()) == 2
    assert ran.err.splitlines()[:2] == [
        "Deployment asap-serving-model-one: created", "Service asap-serving-model-one: created",
    ]  # fmt: skip
    assert ran.err.splitlines()[-2:] == [
        "2 of 2 pods ready",
        "the gateway needs ASAP_SERVING__ENDPOINTS="
        '\'{"Model-One": ["http://asap-serving-model-one.models:8000"]}\'',
    ]
    cluster.objects["deployments", "asap-serving-model-one"]["metadata"]["labels"] = {}
    ran = await asap_process(*model)
    assert ran.code == 65
    assert "somebody else's" in ran.err
    cluster.objects.pop(("deployments", "asap-serving-model-one"))
    ran = await asap_process(*model, "--remove")
    assert ran.code == 0, ran.err
    assert "Service asap-serving-model-one: removed" in ran.err
    assert "Deployment asap-serving-model-one: was not there" in ran.err
    assert cluster.named("services") == []


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--print"], 65, "need --kubernetes"),
        (["--remove"], 65, "need --kubernetes"),
        (["--kubernetes", "--print", "--remove"], 65, "not both"),
        (["--kubernetes"], 78, "KUBECONFIG"),
        (["--kubernetes", "--remove", "--name", "9"], 65, "--name"),
        (["--gpus", "1"], 65, "--gpus does nothing without --kubernetes"),
        (["--kubernetes", "--port", "8000"], 65, "--port does nothing with --kubernetes"),
        (["--kubernetes", "--print", "--timeout", "9"], 65, "--timeout does nothing with --print"),
        (["--kubernetes", "--remove", "--claim", "x"], 65, "--claim does nothing with --remove"),
    ],
)
def test_wrong_options_are_named(asap, options, code, words):
    ran = asap("deploy", "org/model", *options)
    assert ran.code == code
    assert words in ran.err


def plain(value):
    """An object without what only a release has."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items() if key not in BY_HELM}
    return [plain(one) for one in value] if isinstance(value, list) else value


WEIGHTS = {"source": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "revision": "a" * 40,
           "sha256": "5" * 64}  # fmt: skip


def test_the_manifest_is_what_the_chart_gives(asap):
    ran = asap(
        "deploy", WEIGHTS["source"], "--name", "one", "--kubernetes", "--print",
        "--revision", "a" * 40, "--sha256", "5" * 64, "--namespace", NAMESPACE,
        "--claim", "models", "--replicas", 1, "--server-args", "--max-model-len=8192",
        "--registry", "registry.example.com/team",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    mine = list(yaml.safe_load_all(ran.out))
    release = render(
        changed(
            "demo",
            {
                "image": {"registry": "registry.example.com/team"},
                "priority": {"create": False},
                "network": {"weights": ANYWHERE},
                "modelCache": {"create": False, "existingClaim": "models"},
                "serving": {
                    "models": {"one": {"weights": WEIGHTS, "args": ["--max-model-len=8192"]}}
                },
            },
        )
    )
    assert [one["kind"] for one in mine] == ["Deployment", "Service"]
    for one in mine:
        assert one == plain(named(release, one["kind"], "serving-one"))
        for version in VERSIONS:
            kubernetes_validate.validate(one, version, strict=True)
    url = f'{{"one": ["http://asap-serving-one.{NAMESPACE}:8000"]}}'
    assert f"ASAP_SERVING__ENDPOINTS='{url}'" in ran.err


def test_no_cluster_is_asked_for_a_manifest(asap):
    ran = asap("deploy", "org/one", "--kubernetes", "--print")
    assert ran.code == 0, ran.err
    assert len(list(yaml.safe_load_all(ran.out))) == 2


def test_weights_of_a_bucket_bring_its_settings_and_no_key(asap, monkeypatch):
    monkeypatch.setenv("ASAP_BLOBS__URL", "s3://bucket/asap")
    monkeypatch.setenv("ASAP_BLOBS__SECRET_KEY", "planted")
    monkeypatch.setenv("ASAP_BLOBS__ACCESS_KEY", "planted")
    monkeypatch.setenv("ASAP_BLOBS__REGION", "eu-1")
    ran = asap("deploy", "s3://bucket/asap/models/one", "--kubernetes", "--print", "--gpus", 0,
               "--blobs-secret", "keys")  # fmt: skip
    assert ran.code == 0, ran.err
    assert "planted" not in ran.out
    deployment = next(yaml.safe_load_all(ran.out))
    kubernetes_validate.validate(deployment, "1.35", strict=True)
    pod = deployment["spec"]["template"]["spec"]
    told = {one["name"]: one for one in pod["initContainers"][0]["env"]}
    assert told["ASAP_BLOBS__URL"]["value"] == "s3://bucket/asap"
    assert told["ASAP_BLOBS__REGION"]["value"] == "eu-1"
    assert told["ASAP_BLOBS__SECRET_KEY"]["valueFrom"]["secretKeyRef"] == {
        "name": "keys", "key": "ASAP_BLOBS__SECRET_KEY",
    }  # fmt: skip
    assert "nvidia.com/gpu" not in pod["containers"][0]["resources"]["limits"]


@pytest.mark.parametrize("source", ["file:///somewhere/model", "tiny"])
@pytest.mark.parametrize("options", [[], ["--print"]])
def test_what_no_pod_could_fetch_is_refused(asap, tmp_path, source, options):
    (tmp_path / "tiny").mkdir()
    ran = asap("deploy", source, "--kubernetes", *options)
    assert ran.code == 65
    assert "of this machine" in ran.err
