from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys

import pytest
import typer
import yaml
from helm_python import Chart, HelmError, HelmRenderError, HelmValuesError

from asap_cli.main import app
from asap_cli.roles import STAGES, AllSettings
from asap_runtime.settings import check_names, load_settings
from asap_trainer.settings import TrainerSettings
from helm_chart import (
    CASES,
    CHART,
    NAMESPACE,
    PROFILES,
    RELEASE,
    REPOSITORY,
    case_name,
    case_values,
    changed,
    merged,
    named,
    profile,
    render,
)


def _program():
    path = REPOSITORY / "scripts" / "chart_docs.py"
    spec = importlib.util.spec_from_file_location("chart_docs", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["chart_docs"] = module
    spec.loader.exec_module(module)
    return module


chart_docs = _program()
KEYS = chart_docs.read((CHART / "values.yaml").read_text())

WRONG = {
    "unknown key": ({"gateways": {}}, "gateways"),
    "unknown key inside": ({"gateway": {"replica": 2}}, "/gateway.*replica"),
    "unknown key of a worker": ({"workers": {"anchor": {"gpus": 1}}}, "/workers/anchor.*gpus"),
    "unknown worker": ({"workers": {"surprisl": {}}}, "/workers.*surprisl"),
    "unknown setting": ({"config": {"ASAP_LLM__MODELL": "x"}}, "/config.*ASAP_LLM__MODELL"),
    "secret among settings": ({"config": {"ASAP_LLM__API_KEY": "x"}}, "/config.*ASAP_LLM__API_KEY"),
    "setting of the chart": ({"config": {"ASAP_GATEWAY__PORT": 1}}, "/config.*ASAP_GATEWAY__PORT"),
    "map for a setting": ({"config": {"ASAP_LLM__MODEL": {}}}, "/config/ASAP_LLM__MODEL"),
    "text for a number": ({"gateway": {"replicas": "two"}}, "/gateway/replicas"),
    "negative": ({"workers": {"anchor": {"replicas": -1}}}, "/workers/anchor/replicas"),
    "number for text": ({"fullnameOverride": 5}, "/fullnameOverride"),
    "name too long": ({"fullnameOverride": "x" * 41}, "/fullnameOverride"),
    "capitals in a name": ({"secrets": {"llm": {"name": "LLM"}}}, "/secrets/llm/name"),
    "latest": ({"image": {"tag": "latest"}}, "/image/tag"),
    "latest of one": ({"images": {"vllm": {"tag": "latest"}}}, "/images/vllm/tag"),
    "latest of a database": ({"builtin": {"redis": {"image": "redis:latest"}}}, "/builtin/redis"),
    "no tag of a database": ({"builtin": {"redis": {"image": "redis"}}}, "/builtin/redis/image"),
    "half a digest": ({"images": {"light": {"digest": "sha256:12"}}}, "/images/light/digest"),
    "unknown image": ({"workers": {"anchor": {"image": "big"}}}, "/workers/anchor/image"),
    "quantity": ({"defaults": {"tmpSize": "1 GB"}}, "/defaults/tmpSize"),
    "quantity of a resource": (
        {"defaults": {"resources": {"limits": {"memory": "lots"}}}},
        "/defaults/resources/limits/memory",
    ),
    "unknown resource": (
        {"gateway": {"resources": {"limits": {"nvidia.com/gpu": 1}}}},
        "/gateway/resources/limits.*nvidia",
    ),
    "level": ({"grading": {"level": "none"}}, "/grading/level"),
    "scaling": ({"gateway": {"autoscaling": {"kind": "vpa"}}}, "/gateway/autoscaling/kind"),
    "port": ({"network": {"llm": {"ports": [70000]}}}, "/network/llm/ports/0"),
    "peer": ({"network": {"llm": {"peers": [{"cidr": "10.0.0.0/8"}]}}}, "/network/llm/peers/0"),
    "address range": (
        {"network": {"llm": {"peers": [{"ipBlock": {"cidr": "anywhere"}}]}}},
        "/network/llm/peers/0/ipBlock/cidr",
    ),
    "name of a model": ({"serving": {"models": {"A_b": {}}}}, "/serving/models.*A_b"),
    "key of a model": ({"serving": {"models": {"a": {"gpus": 1}}}}, "/serving/models/a.*gpus"),
    "revision": (
        {"workers": {"surprisal": {"weights": {"revision": "main"}}}},
        "/workers/surprisal/weights/revision",
    ),
    "blob store": ({"blobs": {"url": "gs://bucket"}}, "/blobs/url"),
}
"""What the schema refuses, and where it says that it is."""

MISSING = {
    "secrets.database.name": {"builtin": {"postgres": {"enabled": False}}},
    "secrets.queue.name": {"builtin": {"redis": {"enabled": False}}},
    "secrets.pepper.name": {"secrets": {"generate": False}},
    "blobs.url: more than one": {"gateway": {"replicas": 2}},
    "blobs.url: the trainer": {"workers": {"trainer": {"enabled": True}}},
    "blobs.url: workers.surprisal.weights": {
        "modelCache": {"create": True},
        "workers": {"surprisal": {"weights": {"source": "s3://b/a"}}},
    },
    "modelCache.create: one of": {"modelCache": {"create": True, "existingClaim": "a"}},
    "modelCache.create: workers.surprisal": {
        "workers": {"surprisal": {"weights": {"source": "a/b"}}}
    },
    "network.weights.peers: workers.surprisal": {
        "modelCache": {"create": True},
        "workers": {"surprisal": {"weights": {"source": "a/b"}}},
    },
    "workers.surprisal.weights.source: one of": {
        "modelCache": {"create": True},
        "workers": {"surprisal": {"weights": {"source": "a/b"}}},
    },
    "secrets.scorer.name": {"secrets": {"scorer": {"name": "scorer"}}},
    "blobs.url: workers.generate": {"workers": {"generate": {"enabled": True}}},
    "blobs.url: workers.grade": {"workers": {"grade": {"enabled": True}}},
    "workers.generate.config.ASAP_EVALUATOR__BASE_URL": {
        "workers": {"generate": {"enabled": True}}
    },
    "ingress.host": {"ingress": {"enabled": True}},
    "httpRoute.parentRefs": {"httpRoute": {"enabled": True}},
    "workers.grade.runtimeClassName": {
        "workers": {"grade": {"enabled": True}},
        "grading": {"level": "vm"},
    },
    "grading.seccompProfile": {
        "workers": {"grade": {"enabled": True}},
        "grading": {"level": "namespaces"},
    },
    "network.blobs.peers": {"blobs": {"url": "s3://bucket/a"}},
    "network.apiServer.peers": {"workers": {"trainer": {"enabled": True}}},
    "network.llm.peers": {"config": {"ASAP_LLM__MODEL": "large"}},
    "network.otlp.peers": {"secrets": {"otlp": {"name": "a"}}},
    "network.webhooks.peers": {"secrets": {"webhooks": {"name": "a"}}},
    "network.database.peers": {
        "builtin": {"postgres": {"enabled": False}},
        "secrets": {"database": {"name": "a"}},
    },
    "network.queue.peers": {
        "builtin": {"redis": {"enabled": False}},
        "secrets": {"queue": {"name": "a"}},
    },
    "workers.anchor.autoscaling.min: more": {
        "workers": {"anchor": {"autoscaling": {"min": 5, "max": 2}}}
    },
    "workers.anchor.autoscaling.min: only keda": {
        "workers": {"anchor": {"autoscaling": {"kind": "hpa", "min": 0}}}
    },
    "gateway.autoscaling.kind: keda": {"gateway": {"autoscaling": {"kind": "keda"}}},
    "serving.models.a.autoscaling.kind: served": {
        "serving": {"models": {"a": {"autoscaling": {"kind": "hpa"}}}}
    },
    "serving.models.a.weights.source": {"serving": {"models": {"a": {}}}},
    "keda.connection.name": {"workers": {"anchor": {"autoscaling": {"kind": "keda"}}}},
    "keda.prometheusAddress": {
        "workers": {"anchor": {"autoscaling": {"kind": "keda"}}},
        "keda": {"trigger": "prometheus"},
    },
}
"""What no schema can say, over the demo profile: the start of the message, and what brings it."""

PRODUCTION = {
    "builtin.postgres.enabled": {"builtin": {"postgres": {"enabled": True}}},
    "builtin.redis.enabled": {"builtin": {"redis": {"enabled": True}}},
    "secrets.generate": {"secrets": {"generate": True}},
    "network.enabled": {"network": {"enabled": False}},
    "grading.blobsSecret": {"grading": {"blobsSecret": ""}},
    "images.grade.digest": {"images": {"grade": {"digest": ""}}},
    "images.light.digest": {"images": {"light": {"digest": ""}}},
    "images.surprisal.digest": {"images": {"surprisal": {"digest": ""}}},
    "images.train.digest": {"images": {"train": {"digest": ""}}},
    "images.vllm.digest": {"images": {"vllm": {"digest": ""}}},
    "workers.surprisal.weights.sha256": {"workers": {"surprisal": {"weights": {"sha256": ""}}}},
    "serving.models.student.weights.sha256": {
        "serving": {"models": {"student": {"weights": {"sha256": ""}}}}
    },
    "serving.models.student.path": {"serving": {"models": {"student": {"path": "a"}}}},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_schema_names_the_place_of_what_is_wrong(wrong):
    values, place = WRONG[wrong]
    with pytest.raises(HelmValuesError, match=place):
        render(merged(profile("demo"), values))


@pytest.mark.parametrize("said", MISSING)
def test_what_is_missing_is_named(said):
    with pytest.raises(HelmRenderError, match=f"(?m)^{re.escape(said)}"):
        render(merged(profile("demo"), MISSING[said]))


@pytest.mark.parametrize("said", PRODUCTION)
def test_production_refuses_what_is_for_trials(said):
    with pytest.raises(HelmRenderError, match=f"(?m)^{re.escape(said)}: "):
        render(changed("gpu-prod", PRODUCTION[said]))
    render(changed("gpu-prod", {"production": False}, PRODUCTION[said]))


def test_the_profile_of_production_needs_a_file_of_ones_own():
    values = yaml.safe_load((CHART / "values-gpu-prod.yaml").read_text())
    with pytest.raises(HelmRenderError) as caught:
        render(values)
    for path in ("blobs.url", "network.database.peers", "images.light.digest"):
        assert f"\n{path}: " in str(caught.value)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(HelmError) as caught:
        render({})
    said = re.findall(r"(?m)^(secrets\.\w+)\.name: ", str(caught.value))
    assert said == ["secrets.database", "secrets.queue", "secrets.pepper"]


def _sections(schema):
    if schema.get("type") == "object":
        yield schema
    for key in ("properties", "patternProperties", "definitions"):
        for inner in schema.get(key, {}).values():
            yield from _sections(inner)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from _sections(schema[key])


def test_every_section_of_ours_is_closed():
    schema = json.loads((CHART / "values.schema.json").read_text())
    sections = [one for one in _sections(schema) if "properties" in one]
    assert len(sections) > 60
    for one in sections:
        assert one["additionalProperties"] is False


def test_schema_and_readme_are_those_of_the_values():
    for path, text in chart_docs.files().items():
        assert path.read_text() == text, f"{path.name}: run scripts/chart_docs.py"


def test_every_key_has_a_comment_and_a_place_in_the_readme():
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    keys = {key.path: key for key in KEYS}
    readme = (CHART / "README.md").read_text()

    def look(section, path=()):
        for name, value in section.items():
            here = (*path, name)
            if here not in keys:
                # A map in one line is a value, not a section.
                assert isinstance(keys[path].default, dict), here
                continue
            assert len(keys[here].words) >= 4, here
            assert f"| `{'.'.join(here)}` |" in readme
            if isinstance(value, dict):
                look(value, here)

    look(values)
    assert len(keys) > 200


def test_a_key_without_a_comment_is_refused():
    with pytest.raises(ValueError, match=r"a\.b has no comment"):
        chart_docs.read("# Section.\na:\n  b: 1\n")


def test_an_open_value_must_say_what_it_holds():
    with pytest.raises(ValueError, match="a: say by @schema"):
        chart_docs.build(chart_docs.read("# Anything.\na: {}\n"))


def test_defaults_keep_to_their_own_schema():
    chart = Chart.load(str(CHART))
    chart.validate_schema({})
    for name in PROFILES:
        chart.validate_schema(profile(name))


def test_a_chart_without_its_schema_would_let_typing_errors_pass(tmp_path):
    copy = tmp_path / "asap"
    shutil.copytree(CHART, copy)
    (copy / "values.schema.json").unlink()
    values = merged(profile("demo"), {"gateway": {"replica": 2}})
    Chart.load(str(copy)).render(values, name=RELEASE, namespace=NAMESPACE)


def _environment(objects, component):
    """What the component's process finds; secrets by their form."""
    pod = named(objects, "Deployment", component)["spec"]["template"]["spec"]
    [container] = pod["containers"]
    data = named(objects, "ConfigMap", container["envFrom"][0]["configMapRef"]["name"][5:])["data"]
    urls = {"ASAP_DATABASE__URL": "sqlite:////x", "ASAP_QUEUE__URL": "redis://h:6379/0"}
    plain = {one["name"]: one.get("value", urls.get(one["name"], "s" * 40))
             for one in container["env"]}  # fmt: skip
    return {**data, **plain}


@pytest.mark.parametrize("case", [c for c in CASES if c[1] != "another name"], ids=case_name)
def test_every_process_accepts_its_settings(case, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    objects = render(case_values(case))
    stages = {one["metadata"]["name"][5:] for one in objects if one["kind"] == "Deployment"}
    for stage in stages - {one for one in stages if one.startswith("serving-")}:
        for name in [name for name in os.environ if name.startswith("ASAP_")]:
            monkeypatch.delenv(name)
        for name, value in _environment(objects, stage).items():
            monkeypatch.setenv(name, value)
        settings = load_settings(AllSettings)
        if stage == "gateway":
            assert (settings.gateway.host, settings.gateway.port) == ("0.0.0.0", 8000)
        else:
            assert settings.telemetry.admin_port == 9100
        if stage == "trainer":
            trainer = load_settings(TrainerSettings).trainer.kubernetes
            assert (trainer.namespace, trainer.instance) == (NAMESPACE, RELEASE)
            assert trainer.service_account == "asap"
            assert trainer.image.rpartition("/")[2].startswith("asap-train")


def test_settings_of_the_values_are_known_to_every_role():
    names = chart_docs.settings()
    assert len(names) > 40
    known = dict.fromkeys(names, "")
    check_names(AllSettings, known)
    assert not {"ASAP_LLM__API_KEY", "ASAP_AUTH__PEPPER", "ASAP_SERVING__API_KEY"} & set(names)


def _commands():
    def walk(command, path=()):
        if hasattr(command, "commands"):
            for name, inner in command.commands.items():
                yield from walk(inner, (*path, name))
        elif path == ("worker",):
            yield from (("worker", stage) for stage in STAGES)
        else:
            yield path

    return set(walk(typer.main.get_command(app)))


def test_pods_run_commands_that_there_are():
    run = set()
    for case in CASES:
        for one in render(case_values(case)):
            template = one.get("spec", {}).get("template", {}).get("spec", {})
            for container in template.get("initContainers", []) + template.get("containers", []):
                if "command" not in container and "args" in container:
                    arguments = container["args"]
                    run.add(tuple(arguments[: 1 if arguments[0] == "gateway" else 2]))
    assert len(run) >= 9
    assert run <= _commands()
