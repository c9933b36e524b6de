from __future__ import annotations

import base64
import copy
import json
import re

import helm_python
import jsonschema
import kubernetes_validate
import pytest
import yaml

from custom_kinds import SPECS, schema_of
from helm_chart import (
    CASES,
    CHART,
    NAMESPACE,
    PROFILES,
    RELEASE,
    TOGGLES,
    case_name,
    case_values,
    changed,
    chart,
    files,
    merged,
    named,
    profile,
    render,
)

VERSIONS = [f"1.{minor}" for minor in range(29, 38)]
WARNING = 2


@pytest.fixture(scope="module")
def everything():
    """Every object of every case, each different one once."""
    found = {}
    for case in CASES:
        for one in render(case_values(case)):
            if one["kind"] == "Secret":
                one["data"] = dict.fromkeys(one["data"], "")  # by chance, so never twice the same
            found[json.dumps(one, sort_keys=True)] = one
    assert len(found) > 200
    return list(found.values())


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_nothing_to_remark(case):
    report = helm_python.lint(
        str(CHART), case_values(case), strict=True, namespace=NAMESPACE, kube_version="v1.32.0"
    )
    assert report["total_charts_linted"] == 1
    assert [one for one in report["messages"] if one["severity"] >= WARNING] == []


def check(one, version):
    try:
        kubernetes_validate.validate(one, version, strict=True)
    except kubernetes_validate.SchemaNotFoundError:
        jsonschema.validate(one, schema_of(one))


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid(everything, version):
    assert f"{version}.0" in kubernetes_validate.utils.all_versions()
    for one in everything:
        check(one, version)


def test_every_custom_kind_is_rendered_and_its_schema_refuses_what_is_wrong(everything):
    custom = {(one["apiVersion"], one["kind"]): one for one in everything
              if (one["apiVersion"], one["kind"]) in SPECS}  # fmt: skip
    assert custom.keys() == SPECS.keys()
    for one in custom.values():
        broken = copy.deepcopy(one)
        broken["spec"]["minReplicas"] = 1
        with pytest.raises(jsonschema.ValidationError):
            check(broken, "1.32")


@pytest.mark.parametrize(
    "mutate",
    [
        lambda d: d["spec"].update(replica=2),
        lambda d: d["spec"].update(replicas="two"),
        lambda d: d["spec"]["template"]["spec"]["containers"][0].update(readyProbe={}),
        lambda d: d["spec"]["template"]["spec"]["containers"][0]["ports"][0].update(port=1),
    ],
)
def test_the_schemas_refuse_what_is_wrong(mutate):
    deployment = named(render(profile("demo")), "Deployment", "anchor")
    check(deployment, "1.32")
    mutate(deployment)
    with pytest.raises(kubernetes_validate.ValidationError):
        check(deployment, "1.32")


@pytest.mark.parametrize("name", PROFILES)
def test_helm_would_install_it(name):
    config = helm_python.Config(storage_driver="memory", namespace=NAMESPACE)
    release = config.install(chart(), RELEASE, profile(name), dry_run="client")
    assert RELEASE in json.dumps(release)


def test_the_chart_says_which_clusters_it_is_for():
    assert chart().metadata["kubeVersion"] == ">=1.29.0-0"


def stable(values):
    """All objects as text, without what is made by chance."""
    objects = [one for one in render(values) if one["kind"] != "Secret"]
    return json.dumps(objects, sort_keys=True)


@pytest.mark.parametrize("toggle", TOGGLES)
def test_every_toggle_changes_something(toggle):
    assert any(stable(changed(name, toggle)) != stable(profile(name)) for name in PROFILES)


def test_replicas_of_every_stage_come_from_one_template():
    objects = render(changed("gpu-prod", "evaluator"))
    stages = ("anchor", "surprisal", "trainer", "generate", "grade")
    for stage in stages:
        pod = named(objects, "Deployment", stage)["spec"]["template"]["spec"]
        assert pod["containers"][0]["args"] == ["worker", stage]
        assert pod["initContainers"][0]["name"] == "wait"
        assert named(objects, "Service", stage)["spec"]["ports"][0]["targetPort"] == "admin"


def test_a_component_may_say_otherwise_than_the_defaults_false_and_zero_too():
    values = {
        "defaults": {"replicas": 3, "nodeSelector": {"pool": "cpu"}, "tolerations": [{"key": "a"}]},
        "workers": {"anchor": {"replicas": 0, "tolerations": []}},
    }
    objects = render(merged(profile("demo"), values))
    anchor = named(objects, "Deployment", "anchor")["spec"]
    scorer = named(objects, "Deployment", "surprisal")["spec"]
    assert (anchor["replicas"], scorer["replicas"]) == (0, 3)
    assert "tolerations" not in anchor["template"]["spec"]
    assert scorer["template"]["spec"]["tolerations"] == [{"key": "a"}]
    assert anchor["template"]["spec"]["nodeSelector"] == {"pool": "cpu"}


def test_pods_restart_when_their_own_settings_change_and_only_then():
    def marks(values):
        return {
            one["metadata"]["name"]: one["spec"]["template"]["metadata"]["annotations"][
                "checksum/config"
            ]
            for one in render(values)
            if one["kind"] == "Deployment"
        }

    before = marks(profile("demo"))
    own = {"workers": {"anchor": {"config": {"ASAP_LLM__CONCURRENCY": 8}}}}
    after = marks(merged(profile("demo"), own))
    assert {name for name in before if before[name] != after[name]} == {"asap-anchor"}
    of_all = marks(merged(profile("demo"), {"config": {"ASAP_TELEMETRY__LOG_LEVEL": "debug"}}))
    assert all(before[name] != of_all[name] for name in before)


def test_gpus_by_the_name_that_the_cluster_has_for_them():
    objects = render(changed("gpu-prod", "serving"))
    limits = {
        one["metadata"]["name"]: one["spec"]["template"]["spec"]["containers"][0]["resources"][
            "limits"
        ]
        for one in objects
        if one["kind"] == "Deployment"
    }
    assert limits["asap-surprisal"]["nvidia.com/gpu"] == "1"
    assert limits["asap-serving-one"]["nvidia.com/gpu"] == "1"
    assert limits["asap-serving-two"]["nvidia.com/mig-3g.40gb"] == "1"
    assert not [key for key in limits["asap-gateway"] | limits["asap-trainer"] if "/" in key]


def test_weights_are_fetched_and_checked_before_the_scorer_starts():
    objects = render(profile("gpu-prod"))
    pod = named(objects, "Deployment", "surprisal")["spec"]["template"]["spec"]
    [fetch] = [one for one in pod["initContainers"] if one["name"] == "weights"]
    assert fetch["args"][:3] == ["models", "fetch", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"]
    options = dict(argument[2:].split("=") for argument in fetch["args"][3:])
    assert options.keys() == {"revision", "sha256", "out"}
    assert len(options["sha256"]) == 64
    settings = named(objects, "ConfigMap", "surprisal")["data"]
    assert settings["ASAP_SURPRISAL__MODEL"] == options["out"]
    [mount] = [one for one in pod["containers"][0]["volumeMounts"] if one["name"] == "models"]
    assert mount["readOnly"]
    assert options["out"].startswith(mount["mountPath"] + "/")


def test_another_revision_is_another_folder():
    folders = set()
    for revision in ("a" * 40, "b" * 40):
        weights = {"workers": {"surprisal": {"weights": {"revision": revision}}}}
        data = named(render(changed("gpu-prod", weights)), "ConfigMap", "surprisal")["data"]
        folders.add(data["ASAP_SURPRISAL__MODEL"])
    assert len(folders) == 2


def test_the_migration_is_a_hook_except_where_what_it_needs_is_part_of_the_release():
    outside = named(render(profile("gpu-prod")), "Job", "migrate")
    hook = outside["metadata"]["annotations"]
    assert hook["helm.sh/hook"] == "pre-install,pre-upgrade"
    assert hook["helm.sh/hook-delete-policy"] == "before-hook-creation,hook-succeeded"
    for values in (profile("demo"), changed("demo", "a database outside")):
        inside = named(render(values), "Job", "migrate-1")
        assert "annotations" not in inside["metadata"]


def test_what_kubernetes_lets_nobody_change_is_as_in_the_release_before():
    """Else `helm upgrade` is refused. Selectors hold no versions, and nothing of the values."""
    for name, toggle in (("demo", None), ("gpu-prod", "serving"), ("gpu-prod", "placement")):
        objects = render(case_values((name, toggle)))
        for one in objects:
            if one["kind"] in ("Deployment", "StatefulSet"):
                component = one["metadata"]["name"].removeprefix("asap-")
                assert one["spec"]["selector"] == {"matchLabels": {
                    "app.kubernetes.io/name": "asap",
                    "app.kubernetes.io/instance": RELEASE,
                    "app.kubernetes.io/component": component,
                }}  # fmt: skip
            if one["kind"] == "StatefulSet":
                [claim] = one["spec"]["volumeClaimTemplates"]
                assert (one["spec"]["serviceName"], claim["metadata"]["name"]) == (
                    one["metadata"]["name"], "data",
                )  # fmt: skip
                assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]


def test_an_evaluator_asks_the_one_model_that_is_served():
    one = {"serving": {"models": {"one": TOGGLES["serving"]["serving"]["models"]["one"]}}}
    evaluator = {**TOGGLES["evaluator"], "config": {}}
    values = merged(profile("demo"), evaluator, {"modelCache": {"create": True}}, one)
    data = named(render(values), "ConfigMap", "generate")["data"]
    assert data["ASAP_EVALUATOR__BASE_URL"] == "http://asap-serving-one:8000/v1"
    elsewhere = {"config": {"ASAP_EVALUATOR__BASE_URL": "http://other:8000/v1"}}
    data = named(render(merged(values, elsewhere)), "ConfigMap", "generate")["data"]
    assert data["ASAP_EVALUATOR__BASE_URL"] == "http://other:8000/v1"
    with pytest.raises(helm_python.HelmRenderError, match="ASAP_EVALUATOR__BASE_URL: name the"):
        render(merged(values, TOGGLES["serving"]))


def test_a_served_model_is_started_with_what_was_checked():
    pod = named(render(changed("gpu-prod", "serving")), "Deployment", "serving-one")["spec"][
        "template"
    ]["spec"]
    [server], [fetch] = pod["containers"], pod["initContainers"]
    assert server["args"][0] == fetch["args"][-1].removeprefix("--out=")
    assert server["args"][1:] == ["--served-model-name=one", "--port=8000", "--max-model-len=8192"]
    assert server["readinessProbe"]["httpGet"]["path"] == "/health"
    assert {"name": "HF_HUB_OFFLINE", "value": "1"} in server["env"]


def test_passwords_of_the_built_in_databases_agree_with_their_urls():
    data = named(render(profile("demo")), "Secret", "generated")["data"]
    plain = {key: base64.b64decode(value).decode() for key, value in data.items()}
    assert f":{plain['postgres-password']}@asap-postgres:5432/asap" in plain["database"]
    assert f":{plain['redis-password']}@asap-redis:6379/0" in plain["queue"]
    assert len(plain["postgres-password"]) == 32


def test_the_first_key_has_the_form_of_a_key():
    for _ in range(3):
        data = named(render(profile("demo")), "Secret", "generated")["data"]
        token = base64.b64decode(data["firstKey"]).decode()
        assert re.fullmatch(r"asap_([0-9a-f]{16})_([0-9a-f]{64})", token)


def test_the_broker_never_drops_a_message():
    container = named(render(profile("demo")), "StatefulSet", "redis")["spec"]["template"]["spec"][
        "containers"
    ][0]
    options = dict(zip(container["args"][::2], container["args"][1::2], strict=True))
    assert options["--maxmemory-policy"] == "noeviction"
    assert options["--appendonly"] == "yes"
    assert options["--maxmemory"] == "256mb"


def test_the_program_of_the_test_pod_is_python():
    for toggle in ("bucket", "serving"):
        pod = named(render(changed("demo", toggle)), "Pod", "test")
        [program] = pod["spec"]["containers"][0]["args"]
        compile(program, "prune.py", "exec")
        assert ("/v1/models" in program) == (toggle == "serving")


def test_the_notes_say_what_to_do_next():
    for name in PROFILES:
        notes = files(profile(name))["asap/templates/NOTES.txt"]
        assert "helm -n team test asap" in notes
        assert "asap jobs submit" in notes
    assert "no backup" in files(profile("demo"))["asap/templates/NOTES.txt"]


def test_extra_objects_come_out_as_they_went_in():
    [given] = TOGGLES["further objects"]["extraObjects"]
    assert given in render(changed("demo", "further objects"))


def test_the_dashboard_is_the_one_file():
    shown = named(render(profile("gpu-prod")), "ConfigMap", "dashboard")["data"]["asap.json"]
    path = CHART.parent / "grafana" / "asap.json"
    assert shown == path.read_text()
    assert json.loads(shown)["panels"]


def test_profiles_are_yaml_that_helm_reads_alike():
    for name in PROFILES:
        text = (CHART / f"values-{name}.yaml").read_text()
        assert helm_python.values_from_yaml(text) == yaml.safe_load(text)
