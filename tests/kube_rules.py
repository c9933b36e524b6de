"""What every rendered object must keep to, beyond its schema: each rule yields what breaks it.

A rule is a function of all objects; `breaches` runs them all. Rules know Kubernetes and the words
of this chart (components, the trainer's token), not how the chart makes its objects.
"""

from __future__ import annotations

import re
from collections import Counter

from kube_objects import Rendered, amount, label, referred, selects

COMPONENT = "app.kubernetes.io/component"
SECRET_NAMES = re.compile(r"(^|_)(API_KEY|KEY|PASSWORD|SECRET|TOKEN|PEPPER)$")
SECRET_URLS = ("ASAP_DATABASE__URL", "ASAP_QUEUE__URL")
DNS_LABEL = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
OF_THE_NODE = ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace")
VOLUMES = {"emptyDir", "persistentVolumeClaim", "configMap", "secret", "projected"}
GPU_STARTUP_S = 1800
PRE_STOP_S, DRAIN_S, MARGIN_S = 5, 30, 10
TRAINER_MAY = {
    ("batch", "jobs"): {"get", "list", "watch", "create", "delete"},
    ("", "pods"): {"get", "list"},
    ("", "pods/log"): {"get", "list"},
    ("", "services"): {"create"},
}


def pod_security(all_):
    for name, labels, pod in all_.pods():
        yield from (f"{name}: {what}" for what in _context(pod.get("securityContext", {})))
        yield from (f"{name}: {key}" for key in OF_THE_NODE if pod.get(key))
        if pod.get("automountServiceAccountToken", True) != (labels[COMPONENT] == "trainer"):
            yield f"{name}: automountServiceAccountToken"
        if pod.get("enableServiceLinks", True):
            yield f"{name}: enableServiceLinks"
        for volume in pod.get("volumes", []):
            if kinds := set(volume) - {"name"} - VOLUMES:
                yield f"{name}: volume of kind {kinds}"


def _context(context):
    if not context.get("runAsNonRoot"):
        yield "runAsNonRoot"
    if context.get("runAsUser", 0) < 10000:
        yield "runAsUser below 10000"
    if "fsGroup" not in context:
        yield "fsGroup"
    if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "seccompProfile"


def container_security(all_):
    for where, labels, _, container, _ in all_.containers():
        context = container.get("securityContext", {})
        if context.get("allowPrivilegeEscalation", True):
            yield f"{where}: allowPrivilegeEscalation"
        if context.get("privileged"):
            yield f"{where}: privileged"
        if not context.get("readOnlyRootFilesystem"):
            yield f"{where}: readOnlyRootFilesystem"
        if not context.get("runAsNonRoot") or context.get("runAsUser", 10000) < 10000:
            yield f"{where}: root in the container"
        if context.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{where}: capabilities"
        excepted = all_.namespaces_level and labels[COMPONENT] == "grade"
        if not excepted and {"procMount", "seccompProfile"} & set(context):
            yield f"{where}: procMount or seccompProfile of its own"
        if any("hostPort" in port for port in container.get("ports", [])):
            yield f"{where}: hostPort"


def writable_folders(all_):
    for where, _, pod, container, _ in all_.containers():
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        claims = {one["metadata"]["name"] for name in [where] for one in _templates(all_, name)}
        mounts = container.get("volumeMounts", [])
        for mount in mounts:
            if mount["name"] not in volumes.keys() | claims:
                yield f"{where}: mount of an unknown volume {mount['name']}"
        if "/tmp" not in [mount["mountPath"] for mount in mounts]:
            yield f"{where}: no writable /tmp"
        for path, count in Counter(mount["mountPath"] for mount in mounts).items():
            if count > 1:
                yield f"{where}: {path} is mounted twice"


def _templates(all_, where):
    for one in all_.of("StatefulSet"):
        if where.startswith(label(one) + "/"):
            yield from one["spec"].get("volumeClaimTemplates", [])


def resources(all_):
    for where, _, _, container, _ in all_.containers():
        given = container.get("resources", {})
        requests, limits = given.get("requests", {}), given.get("limits", {})
        for name in ("cpu", "memory", "ephemeral-storage"):
            if name not in requests:
                yield f"{where}: no request of {name}"
        for name in ("memory", "ephemeral-storage"):
            if name not in limits:
                yield f"{where}: no limit of {name}"
        for name in requests.keys() & limits.keys():
            if amount(requests[name]) > amount(limits[name]):
                yield f"{where}: request of {name} above its limit"
    for name, _, pod in all_.pods():
        yield from _folders(name, pod)


def _folders(name, pod):
    """Writable folders are part of a pod's limits: one that is larger than they evicts it."""
    totals = Counter()
    for volume in pod.get("volumes", []):
        if (folder := volume.get("emptyDir")) is not None:
            if "sizeLimit" not in folder:
                yield f"{name}: folder {volume['name']} without a size"
                continue
            kind = "memory" if folder.get("medium") == "Memory" else "ephemeral-storage"
            totals[kind] += amount(folder["sizeLimit"])
    for kind, total in totals.items():
        limits = [one.get("resources", {}).get("limits", {}) for one in pod["containers"]]
        if total > sum(amount(limit.get(kind, 0)) for limit in limits):
            yield f"{name}: folders larger than the limit of {kind}"


def probes(all_):
    for one, template in all_.workloads():
        if one["kind"] not in ("Deployment", "StatefulSet", "DaemonSet"):
            continue
        pod, component = template["spec"], template["metadata"]["labels"][COMPONENT]
        for container in pod["containers"]:
            where = f"{label(one)}/{container['name']}"
            found = {
                key: container.get(f"{key}Probe") for key in ("startup", "liveness", "readiness")
            }
            for key, probe in found.items():
                if probe is None:
                    yield f"{where}: no {key} probe"
            if None in found.values():
                continue
            if _asked(found["liveness"]) == _asked(found["readiness"]):
                yield f"{where}: liveness and readiness ask the same"
            start = found["startup"]
            has_gpu = any("/" in name for name in container["resources"]["limits"])
            budget = start["periodSeconds"] * start["failureThreshold"]
            if has_gpu and budget < GPU_STARTUP_S:
                yield f"{where}: {budget} s to start with a GPU"
            if component == "gateway" or component.startswith("serving"):
                yield from _leaving(where, pod, container)


def _asked(probe):
    return {key: probe[key] for key in ("httpGet", "tcpSocket", "exec", "grpc") if key in probe}


def _leaving(where, pod, container):
    hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
    if hook != ["sleep", str(PRE_STOP_S)]:
        yield f"{where}: no preStop of {PRE_STOP_S} s"
    if pod["terminationGracePeriodSeconds"] < PRE_STOP_S + DRAIN_S + MARGIN_S:
        yield f"{where}: terminationGracePeriodSeconds"


def images(all_):
    for where, _, _, container, _ in all_.containers():
        image = container["image"]
        name = image.rpartition("/")[2]
        if "@" not in name and ":" not in name:
            yield f"{where}: image {image} without a tag"
        if name.endswith(":latest"):
            yield f"{where}: image {image}"
        if all_.digests and not re.search(r"@sha256:[0-9a-f]{64}$", image):
            yield f"{where}: image {image} without a digest"


def names(all_):
    for one in all_.objects:
        name = one["metadata"]["name"]
        if not DNS_LABEL.fullmatch(name):
            yield f"{label(one)}: not a name of 63 characters or less"
        # A pod of a StatefulSet, and its label, have ten characters more.
        if one["kind"] == "StatefulSet" and len(name) > 52:
            yield f"{label(one)}: name too long for its pods"
    seen = Counter(label(one) for one in all_.objects)
    yield from (f"{one}: twice" for one, count in seen.items() if count > 1)
    for where, _, _, container, _ in all_.containers():
        for key in ("env", "ports"):
            found = Counter(entry["name"] for entry in container.get(key, []))
            yield from (f"{where}: {key} {n} twice" for n, count in found.items() if count > 1)


def selectors(all_):
    templates = {label(one): template for one, template in all_.workloads()}
    labels = {name: one["metadata"]["labels"] for name, one in templates.items()}
    for one in all_.of("Deployment", "StatefulSet", "DaemonSet"):
        selector, name = one["spec"]["selector"], label(one)
        chosen = [other for other, own in labels.items() if selects(selector, own)]
        if chosen != [name]:
            yield f"{name}: its selector chooses {chosen}"
        for spread in templates[name]["spec"].get("topologySpreadConstraints", []):
            if not selects(spread["labelSelector"], labels[name]):
                yield f"{name}: its spread does not count its own pods"
    for one in all_.of("PodDisruptionBudget"):
        if not any(selects(one["spec"]["selector"], own) for own in labels.values()):
            yield f"{label(one)}: chooses no pod"
    yield from _services(all_, templates)
    yield from _monitors(all_)


def _services(all_, templates):
    for one in all_.of("Service"):
        selector = one["spec"]["selector"]
        chosen = [t for t in templates.values() if selects(selector, t["metadata"]["labels"])]
        if len(chosen) != 1:
            yield f"{label(one)}: chooses {len(chosen)} workloads"
            continue
        containers = chosen[0]["spec"]["containers"]
        known = {port["name"] for one in containers for port in one.get("ports", [])}
        for port in one["spec"]["ports"]:
            if port["targetPort"] not in known:
                yield f"{label(one)}: no port {port['targetPort']} in its pods"


def _monitors(all_):
    for one in all_.of("ServiceMonitor"):
        selector = one["spec"]["selector"]
        ports = {
            port["name"]
            for service in all_.of("Service")
            if selects(selector, service["metadata"]["labels"])
            for port in service["spec"]["ports"]
        }
        for end in one["spec"]["endpoints"]:
            if end["port"] not in ports:
                yield f"{label(one)}: no Service with port {end['port']}"


def references(all_):
    there = {(one["kind"], one["metadata"]["name"]) for one in all_.objects}
    for kind, name, whose in referred(all_):
        if (kind, name) not in there and name not in all_.external:
            yield f"{whose}: there is no {kind} {name}"
    scaled = set()
    for one in all_.of("HorizontalPodAutoscaler", "ScaledObject"):
        scaled.add(one["spec"]["scaleTargetRef"]["name"])
    for one in all_.of("Deployment"):
        if ("replicas" in one["spec"]) == (one["metadata"]["name"] in scaled):
            yield f"{label(one)}: replicas are both given and scaled, or neither"


def rights(all_):
    for one in all_.of("ClusterRole", "ClusterRoleBinding"):
        yield f"{label(one)}: rights in the whole cluster"
    for one in all_.of("Role"):
        for rule in one["rules"]:
            for group in rule["apiGroups"]:
                for resource in rule["resources"]:
                    allowed = TRAINER_MAY.get((group, resource), set())
                    if excess := set(rule["verbs"]) - allowed:
                        yield f"{label(one)}: may {sorted(excess)} {resource}"
    for one in all_.of("RoleBinding"):
        for subject in one["subjects"]:
            if not subject["name"].endswith("-trainer"):
                yield f"{label(one)}: rights for {subject['name']}"


def jobs(all_):
    for one in all_.of("Job"):
        if one["spec"]["template"]["spec"].get("restartPolicy") not in ("Never", "OnFailure"):
            yield f"{label(one)}: restartPolicy"
        if "backoffLimit" not in one["spec"] or "activeDeadlineSeconds" not in one["spec"]:
            yield f"{label(one)}: no end to its tries"
    # What runs before the release cannot use what the release brings.
    own = {(o["kind"], o["metadata"]["name"]) for o in all_.objects}
    for one in all_.objects:
        hook = one["metadata"].get("annotations", {}).get("helm.sh/hook", "")
        if hook.startswith("pre-"):
            for kind, name, _ in referred(Rendered([one])):
                if (kind, name) in own:
                    yield f"{label(one)}: runs before {kind} {name} is there"


def secrets(all_):
    for where, _, _, container, _ in all_.containers():
        for variable in container.get("env", []):
            name = variable["name"]
            if _is_secret(name) and "valueFrom" not in variable and "$(" not in variable["value"]:
                yield f"{where}: {name} in plain text"
    for one in all_.of("ConfigMap"):
        yield from (f"{label(one)}: {key}" for key in one.get("data", {}) if _is_secret(key))


def _is_secret(name):
    return name in SECRET_URLS or SECRET_NAMES.search(name) is not None


def updates(all_):
    budgets = [one["spec"]["selector"] for one in all_.of("PodDisruptionBudget")]
    scaled = {one["spec"]["scaleTargetRef"]["name"]: one["spec"]
              for one in all_.of("HorizontalPodAutoscaler", "ScaledObject")}  # fmt: skip
    for one in all_.of("Deployment"):
        template = one["spec"]["template"]
        scale = scaled.get(one["metadata"]["name"], {})
        most = scale.get("maxReplicas") or scale.get("maxReplicaCount") or one["spec"]["replicas"]
        has_budget = any(selects(own, template["metadata"]["labels"]) for own in budgets)
        if has_budget != (most > 1):
            yield f"{label(one)}: disruption budget"
        keys = {s["topologyKey"] for s in template["spec"].get("topologySpreadConstraints", [])}
        if keys != {"kubernetes.io/hostname", "topology.kubernetes.io/zone"}:
            yield f"{label(one)}: topologySpreadConstraints"
        if "checksum/config" not in template["metadata"].get("annotations", {}):
            yield f"{label(one)}: checksum/config"
        has_gpu = any("/" in name for container in template["spec"]["containers"]
                      for name in container["resources"]["limits"])  # fmt: skip
        rolling = one["spec"]["strategy"].get("rollingUpdate", {"maxSurge": 0})
        if has_gpu and rolling["maxSurge"] != 0:
            yield f"{label(one)}: a new pod would wait for the devices of an old one"
        component = template["metadata"]["labels"][COMPONENT]
        if component == "gateway" and rolling.get("maxUnavailable", 0) != 0:
            yield f"{label(one)}: maxUnavailable"
    for name, spec in scaled.items():
        behavior = (
            spec.get("behavior") or spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        )
        down = behavior["scaleDown"]
        if down["policies"] != [{"type": "Pods", "value": 1, "periodSeconds": 60}]:
            yield f"{name}: more than one pod a step down"


RULES = (
    pod_security, container_security, writable_folders, resources, probes, images, names,
    selectors, references, rights, jobs, secrets, updates,
)  # fmt: skip


def breaches(rendered):
    """Everything that breaks a rule, as `rule: what`."""
    return [f"{rule.__name__}: {what}" for rule in RULES for what in rule(rendered)]
