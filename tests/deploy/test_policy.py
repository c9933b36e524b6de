from __future__ import annotations

import copy

import pytest

from asap_cli.serve import GRACE_S
from helm_chart import CASES, TOGGLES, case_name, case_values, changed, named, profile, render
from kube_objects import Rendered
from kube_rules import DRAIN_S, RULES, breaches


def external(values):
    """Names that the values give for objects of somebody else, and those of the toggles."""
    found = {"ca"}

    def look(value):
        if isinstance(value, dict):
            found.update(
                value[key] for key in ("name", "tlsSecret", "existingClaim") if key in value
            )
            for one in value.values():
                look(one)

    for key in ("secrets", "keda", "modelCache", "monitoring", "ingress"):
        look(values.get(key, {}))
    found.add(values.get("grading", {}).get("blobsSecret", ""))
    return (found | set(values.get("image", {}).get("pullSecrets", []))) - {""}


def rendered(values):
    return Rendered(
        render(values),
        external(values),
        digests=values.get("production", False),
        namespaces_level=values.get("grading", {}).get("level") == "namespaces",
    )


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_every_container_and_object_keeps_to_the_rules(case):
    found = rendered(case_values(case))
    assert len(list(found.containers())) >= 6
    assert breaches(found) == []


def test_the_rule_of_grace_knows_how_long_the_gateway_drains():
    assert DRAIN_S == GRACE_S


def full():
    """Production with everything that a rule looks at."""
    values = changed("gpu-prod", "serving", "ingress", "route", "monitoring", "all secrets")
    return rendered(values)


def gateway(all_):
    return named(all_.objects, "Deployment", "gateway")["spec"]["template"]["spec"]


def trainer_role(all_):
    return named(all_.objects, "Role", "trainer")["rules"]


def first(all_, kind):
    return all_.of(kind)[0]


def _set(where, key, value):
    def mutate(all_):
        where(all_)[key] = value

    return mutate


def _drop(where, key):
    def mutate(all_):
        del where(all_)[key]

    return mutate


def container(all_):
    return gateway(all_)["containers"][0]


def waiting(all_):
    return gateway(all_)["initContainers"][0]


def scorer(all_):
    return named(all_.objects, "Deployment", "surprisal")


def migration(all_):
    return first(all_, "Job")["spec"]["template"]["spec"]


MUTATIONS = {
    "pod_security: Deployment asap-gateway: runAsNonRoot": _drop(
        lambda a: gateway(a)["securityContext"], "runAsNonRoot"
    ),
    "pod_security: Deployment asap-gateway: runAsUser": _set(
        lambda a: gateway(a)["securityContext"], "runAsUser", 1000
    ),
    "pod_security: Deployment asap-gateway: fsGroup": _drop(
        lambda a: gateway(a)["securityContext"], "fsGroup"
    ),
    "pod_security: Deployment asap-gateway: seccompProfile": _set(
        lambda a: gateway(a)["securityContext"], "seccompProfile", {"type": "Unconfined"}
    ),
    "pod_security: Deployment asap-gateway: hostNetwork": _set(gateway, "hostNetwork", True),
    "pod_security: Deployment asap-gateway: shareProcessNamespace": _set(
        gateway, "shareProcessNamespace", True
    ),
    "pod_security: Deployment asap-gateway: automountServiceAccountToken": _drop(
        gateway, "automountServiceAccountToken"
    ),
    "pod_security: Deployment asap-gateway: enableServiceLinks": _drop(
        gateway, "enableServiceLinks"
    ),
    "pod_security: Deployment asap-gateway: volume of kind": lambda a: gateway(a)["volumes"].append(
        {"name": "root", "hostPath": {"path": "/"}}
    ),
    "container_security: Deployment asap-gateway/gateway: privileged": _set(
        lambda a: container(a)["securityContext"], "privileged", True
    ),
    "container_security: Deployment asap-gateway/wait: allowPrivilegeEscalation": _drop(
        lambda a: waiting(a)["securityContext"], "allowPrivilegeEscalation"
    ),
    "container_security: Deployment asap-gateway/wait: readOnlyRootFilesystem": _drop(
        lambda a: waiting(a)["securityContext"], "readOnlyRootFilesystem"
    ),
    "container_security: Deployment asap-gateway/gateway: root": _set(
        lambda a: container(a)["securityContext"], "runAsUser", 0
    ),
    "container_security: Job asap-migrate/schema: capabilities": _set(
        lambda a: migration(a)["initContainers"][0]["securityContext"],
        "capabilities",
        {"drop": ["ALL"], "add": ["NET_ADMIN"]},
    ),
    "container_security: Deployment asap-gateway/gateway: procMount": _set(
        lambda a: container(a)["securityContext"], "procMount", "Unmasked"
    ),
    "container_security: Deployment asap-gateway/gateway: hostPort": _set(
        lambda a: container(a)["ports"][0], "hostPort", 80
    ),
    "writable_folders: Deployment asap-gateway/gateway: no writable /tmp": lambda a: container(a)[
        "volumeMounts"
    ].pop(1),
    "writable_folders: Deployment asap-gateway/gateway: mount of an unknown": _set(
        lambda a: container(a)["volumeMounts"][0], "name", "nowhere"
    ),
    "writable_folders: Deployment asap-gateway/gateway: /tmp is mounted twice": _set(
        lambda a: container(a)["volumeMounts"][0], "mountPath", "/tmp"
    ),
    "resources: Deployment asap-gateway/gateway: no limit of memory": _drop(
        lambda a: container(a)["resources"]["limits"], "memory"
    ),
    "resources: Deployment asap-gateway/wait: no request of cpu": _drop(
        lambda a: waiting(a)["resources"]["requests"], "cpu"
    ),
    "resources: Deployment asap-gateway/gateway: request of memory above": _set(
        lambda a: container(a)["resources"]["requests"], "memory", "500Gi"
    ),
    "resources: Deployment asap-gateway: folder home without a size": _set(
        lambda a: gateway(a)["volumes"][0], "emptyDir", {}
    ),
    "resources: Deployment asap-gateway: folders larger": _set(
        lambda a: gateway(a)["volumes"][0], "emptyDir", {"sizeLimit": "1Ti"}
    ),
    "probes: Deployment asap-gateway/gateway: no readiness": _drop(container, "readinessProbe"),
    "probes: Deployment asap-gateway/gateway: liveness and readiness": lambda a: container(
        a
    ).update(livenessProbe=container(a)["readinessProbe"]),
    "probes: Deployment asap-surprisal/surprisal: 5 s to start": _set(
        lambda a: scorer(a)["spec"]["template"]["spec"]["containers"][0]["startupProbe"],
        "failureThreshold",
        1,
    ),
    "probes: Deployment asap-gateway/gateway: no preStop": _drop(container, "lifecycle"),
    "probes: Deployment asap-gateway/gateway: terminationGrace": _set(
        gateway, "terminationGracePeriodSeconds", 30
    ),
    "images: Deployment asap-gateway/wait: image asap:latest": _set(
        waiting, "image", "asap:latest"
    ),
    "images: Deployment asap-gateway/gateway: image asap:1 without a digest": _set(
        container, "image", "asap:1"
    ),
    "images: Deployment asap-gateway/gateway: image host:5000/asap without a tag": _set(
        container, "image", "host:5000/asap"
    ),
    "names: Role asap-trainer-": _set(
        lambda a: named(a.objects, "Role", "trainer")["metadata"],
        "name",
        "asap-trainer-" + "x" * 60,
    ),
    "names: Service asap-gateway: twice": lambda a: a.objects.append(
        named(a.objects, "Service", "gateway")
    ),
    "names: Deployment asap-gateway/gateway: env HOME twice": lambda a: container(a)["env"].append(
        {"name": "HOME", "value": "/"}
    ),
    "selectors: Deployment asap-gateway: its selector": _set(
        lambda a: named(a.objects, "Deployment", "gateway")["spec"]["selector"]["matchLabels"],
        "app.kubernetes.io/component",
        "anchor",
    ),
    "selectors: Service asap-gateway: chooses": _set(
        lambda a: named(a.objects, "Service", "gateway")["spec"]["selector"], "a", "b"
    ),
    "selectors: Service asap-gateway: no port": _set(
        lambda a: named(a.objects, "Service", "gateway")["spec"]["ports"][0], "targetPort", "web"
    ),
    "selectors: PodDisruptionBudget asap-anchor: chooses no pod": _set(
        lambda a: named(a.objects, "PodDisruptionBudget", "anchor")["spec"]["selector"],
        "matchLabels",
        {"a": "b"},
    ),
    "selectors: ServiceMonitor asap-gateway: no Service": _set(
        lambda a: named(a.objects, "ServiceMonitor", "gateway")["spec"]["endpoints"][0],
        "port",
        "web",
    ),
    "references: Deployment asap-gateway/gateway: there is no Secret": _set(
        lambda a: container(a)["env"][-1]["valueFrom"]["secretKeyRef"], "name", "nowhere"
    ),
    "references: Deployment asap-gateway/wait: there is no ConfigMap": _set(
        lambda a: waiting(a)["envFrom"][0]["configMapRef"], "name", "nowhere"
    ),
    "references: Deployment asap-gateway: there is no ServiceAccount": _set(
        gateway, "serviceAccountName", "nowhere"
    ),
    "references: Deployment asap-surprisal: there is no PersistentVolumeClaim": lambda a: (
        a.objects.remove(named(a.objects, "PersistentVolumeClaim", "models"))
    ),
    "references: Deployment asap-gateway: there is no PriorityClass": _set(
        gateway, "priorityClassName", "nowhere"
    ),
    "references: Ingress asap-gateway: there is no Service": lambda a: a.objects.remove(
        named(a.objects, "Service", "gateway")
    ),
    "references: Deployment asap-gateway: replicas": _set(
        lambda a: named(a.objects, "Deployment", "gateway")["spec"], "replicas", 3
    ),
    "rights: Role asap-trainer: may": _set(lambda a: trainer_role(a)[0], "verbs", ["*"]),
    "rights: Role asap-trainer: may ['get'] secrets": lambda a: trainer_role(a).append(
        {"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"]}
    ),
    "rights: RoleBinding asap-trainer: rights for asap": _set(
        lambda a: first(a, "RoleBinding")["subjects"][0], "name", "asap"
    ),
    "rights: ClusterRole": lambda a: a.objects.append(
        {"kind": "ClusterRole", "metadata": {"name": "all"}, "rules": []}
    ),
    "jobs: Job asap-migrate: restartPolicy": _drop(migration, "restartPolicy"),
    "jobs: Job asap-migrate: no end": _drop(lambda a: first(a, "Job")["spec"], "backoffLimit"),
    "jobs: Job asap-migrate: runs before ServiceAccount asap": _set(
        migration, "serviceAccountName", "asap"
    ),
    "secrets: Deployment asap-gateway/gateway: ASAP_AUTH__PEPPER": lambda a: container(a)[
        "env"
    ].append({"name": "ASAP_AUTH__PEPPER", "value": "in plain text"}),
    "secrets: ConfigMap asap-gateway: ASAP_DATABASE__URL": _set(
        lambda a: named(a.objects, "ConfigMap", "gateway")["data"], "ASAP_DATABASE__URL", "x"
    ),
    "updates: Deployment asap-anchor: disruption budget": lambda a: a.objects.remove(
        named(a.objects, "PodDisruptionBudget", "anchor")
    ),
    "updates: Deployment asap-gateway: topologySpread": _drop(gateway, "topologySpreadConstraints"),
    "updates: Deployment asap-gateway: checksum/config": _drop(
        lambda a: named(a.objects, "Deployment", "gateway")["spec"]["template"]["metadata"],
        "annotations",
    ),
    "updates: Deployment asap-surprisal: a new pod": _set(
        lambda a: scorer(a)["spec"]["strategy"]["rollingUpdate"], "maxSurge", 1
    ),
    "updates: Deployment asap-gateway: maxUnavailable": _set(
        lambda a: named(a.objects, "Deployment", "gateway")["spec"]["strategy"]["rollingUpdate"],
        "maxUnavailable",
        1,
    ),
    "updates: asap-surprisal: more than one pod": _set(
        lambda a: named(a.objects, "ScaledObject", "surprisal")["spec"]["advanced"][
            "horizontalPodAutoscalerConfig"
        ]["behavior"]["scaleDown"],
        "policies",
        [],
    ),
}
"""The start of what a rule says, and what breaks it."""


@pytest.fixture(scope="module")
def whole():
    return full()


@pytest.mark.parametrize("said", MUTATIONS)
def test_a_broken_rule_is_seen(whole, said):
    broken = copy.deepcopy(whole)
    MUTATIONS[said](broken)
    found = breaches(broken)
    assert any(one.startswith(said) for one in found), found


def test_each_rule_has_been_broken():
    assert {said.partition(":")[0] for said in MUTATIONS} == {rule.__name__ for rule in RULES}


def test_only_the_trainer_has_rights_and_a_token():
    found = rendered(profile("gpu-prod"))
    tokens = [name for name, _, pod in found.pods() if pod["automountServiceAccountToken"]]
    assert tokens == ["Deployment asap-trainer"]
    assert [one["metadata"]["name"] for one in found.of("Role")] == ["asap-trainer"]
    services = [rule for rule in trainer_role(found) if "services" in rule["resources"]]
    assert services == []  # one node each
    several = rendered(changed("gpu-prod", "several nodes"))
    [services] = [rule for rule in trainer_role(several) if "services" in rule["resources"]]
    assert services["verbs"] == ["create"]
    assert not rendered(profile("demo")).of("Role")


def test_grading_pods_get_secrets_of_their_stores_only_and_keys_that_only_read():
    for level in ("evaluator", "grade in namespaces", "grade in a machine"):
        found = rendered(changed("gpu-prod", level, "all secrets"))
        pod = named(found.objects, "Deployment", "grade")["spec"]["template"]["spec"]
        secret = {
            one["name"]: one["valueFrom"]["secretKeyRef"]["name"]
            for container in pod["initContainers"] + pod["containers"]
            for one in container["env"]
            if "valueFrom" in one
        }
        assert secret == {
            "ASAP_DATABASE__URL": "asap-database",
            "ASAP_QUEUE__URL": "asap-queue",
            "ASAP_BLOBS__ACCESS_KEY": "asap-blobs-read",
            "ASAP_BLOBS__SECRET_KEY": "asap-blobs-read",
        }


def test_the_exception_of_grading_pods_is_theirs_alone_and_only_at_that_level():
    for toggle in TOGGLES:
        found = rendered(changed("demo", toggle))
        special = {
            where
            for where, _, pod, container, _ in found.containers()
            if "procMount" in container["securityContext"] or "hostUsers" in pod
        }
        expected = {"Deployment asap-grade/grade", "Deployment asap-grade/wait"}
        assert special == (expected if toggle == "grade in namespaces" else set())
    pod = named(
        render(changed("demo", "grade in namespaces")), "Deployment", "grade"
    )["spec"]["template"]["spec"]  # fmt: skip
    assert pod["hostUsers"] is False
    assert pod["containers"][0]["securityContext"]["seccompProfile"] == {
        "type": "Localhost",
        "localhostProfile": "asap/grade.json",
    }
    assert "procMount" not in pod["initContainers"][0]["securityContext"]
