from __future__ import annotations

import json
import re

import pytest
from prometheus_client import REGISTRY

import asap_runtime.telemetry  # noqa: F401  the metrics are registered by importing it
from helm_chart import CHART, NAMESPACE, REPOSITORY, changed, named, profile, render

FOREIGN = {
    "kubelet_volume_stats_available_bytes": {"persistentvolumeclaim"},
    "kubelet_volume_stats_capacity_bytes": {"persistentvolumeclaim"},
    "certmanager_certificate_expiration_timestamp_seconds": {"name"},
    "kube_cronjob_status_last_successful_time": {"cronjob"},
}
"""Metrics of kubelet, cert-manager and kube-state-metrics, with those of their labels we use."""
TARGET = {"namespace", "pod", "service"}
"""Labels that Prometheus adds to what it reads."""
SPOKEN = {
    "sum", "min", "max", "avg", "count", "rate", "increase", "histogram_quantile", "time", "absent",
    "by", "on", "and", "or", "unless",
}  # fmt: skip
DOCUMENT = (REPOSITORY / "docs" / "operations.md").read_text()


def metrics():
    """Sample name to (kind, labels) of everything that our processes export."""
    found = {}
    for collector in set(REGISTRY._collector_to_names):
        labels = set(getattr(collector, "_labelnames", ()))
        for family in collector.describe() if hasattr(collector, "describe") else ():
            ends = {
                "counter": ["_total"],
                "gauge": [""],
                "histogram": ["_bucket", "_sum", "_count"],
            }
            for end in ends.get(family.type, []):
                own = labels | ({"le"} if end == "_bucket" else set())
                found[family.name + end] = (family.type, own)
    return {name: what for name, what in found.items() if name.startswith("asap_")}


METRICS = metrics()


def rules(**changes):
    values = changed("gpu-prod", "monitoring", changes)
    rule = named(render(values), "PrometheusRule", "alerts")
    return {one["alert"]: one for one in rule["spec"]["groups"][0]["rules"]}


RULES = rules()


def panels():
    board = json.loads((CHART.parent / "grafana" / "asap.json").read_text())
    return {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in board["panels"]
        for target in panel["targets"]
    }


EXPRESSIONS = {name: one["expr"] for name, one in RULES.items()} | panels()


def faults(expression):
    """What is wrong with a query, as far as its words tell."""
    plain = re.sub(r'"[^"]*"', '""', expression)
    for pair in ("()", "{}", "[]"):
        if plain.count(pair[0]) != plain.count(pair[1]):
            yield f"unbalanced {pair}"
    if "=>" in plain or "==" in plain:
        yield "equality of floats"
    outside = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(by|on)\s*\([^)]*\)", " ", plain)
    for word in re.findall(r"[A-Za-z_]\w*", outside):
        if word not in SPOKEN and word not in METRICS and word not in FOREIGN:
            yield f"{word} is no metric"
    yield from _labels(plain)
    for name, (kind, _) in METRICS.items():
        for found in re.finditer(rf"\b{name}\b(\{{[^}}]*\}})?(\[\w+\])?", plain):
            if kind in ("counter", "histogram") and found[2] is None:
                yield f"{name} only ever grows; take its rate"
            if kind == "gauge" and found[2] is not None:
                yield f"{name} is a gauge"


def _labels(plain):
    used = set()
    for name, matchers in re.findall(r"([a-z_]\w*)\{([^}]*)\}", plain):
        own = METRICS[name][1] if name in METRICS else FOREIGN.get(name, set())
        used |= own | TARGET
        for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers):
            if label not in own | TARGET:
                yield f"{name} has no label {label}"
    for group in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", plain):
        for label in re.findall(r"\w+", group):
            if label not in used:
                yield f"nothing has a label {label}"


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_every_query_asks_for_metrics_and_labels_that_there_are(name):
    assert list(faults(EXPRESSIONS[name])) == []


def test_there_are_metrics_alerts_and_panels_to_look_at():
    assert len(METRICS) > 40
    assert len(RULES) >= 14
    assert len(panels()) >= 20


@pytest.mark.parametrize(
    ("expression", "fault"),
    [
        ('max(asap_oldest_due{namespace="x"}) > 1', "asap_oldest_due is no metric"),
        ('max by (stage) (asap_queue_up{namespace="x"}) > 1', "nothing has a label stage"),
        ('max(asap_queue_up{stage="x"})', "asap_queue_up has no label stage"),
        ('sum(asap_items_total{namespace="x"}) > 1', "asap_items_total only ever grows"),
        ('sum(rate(asap_queue_up{namespace="x"}[5m]))', "asap_queue_up is a gauge"),
        ('sum(rate(asap_items_total{namespace="x"}[5m])', "unbalanced ()"),
        ('summ(asap_queue_up{namespace="x"})', "summ is no metric"),
    ],
)
def test_a_query_that_cannot_work_is_seen(expression, fault):
    assert any(one.startswith(fault) for one in faults(expression)), list(faults(expression))


@pytest.mark.parametrize("name", RULES)
def test_every_alert_has_its_paragraph(name):
    found = re.search(rf"^### {name}\n(.+?)(?=^#|\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert found, f"docs/operations.md does not say what {name} means"
    assert len(found[1].split()) >= 15


def test_no_paragraph_is_about_an_alert_that_is_gone():
    assert set(re.findall(r"^### (Asap\w+)$", DOCUMENT, re.MULTILINE)) == set(RULES)


def test_alerts_look_at_their_own_namespace():
    for name, one in RULES.items():
        asked = re.findall(r"\w+\{([^}]*)\}", one["expr"])
        assert asked, name
        for matchers in asked:
            assert f'namespace="{NAMESPACE}"' in matchers, name


def test_alerts_say_in_words_what_is_the_matter():
    for one in RULES.values():
        assert len(one["annotations"]["summary"].split()) >= 6
        for label in re.findall(r"\$labels\.(\w+)", one["annotations"]["summary"]):
            grouped = re.findall(r"by \(([^)]*)\)", one["expr"])
            assert grouped == [] or label in grouped[0]


def test_alerts_that_need_a_value_come_with_it():
    values = changed("gpu-prod", {"workers": {"grade": {"enabled": False}}})
    plain = named(render(values), "PrometheusRule", "alerts")["spec"]["groups"][0]["rules"]
    without = {one["alert"] for one in plain}
    assert set(RULES) - without == {
        "AsapCostHigh", "AsapCertificateExpires", "AsapBackupOld", "AsapSandboxMissing",
    }  # fmt: skip
    assert "> 12.5" in RULES["AsapCostHigh"]["expr"]
    assert 'cronjob="asap-backup"' in RULES["AsapBackupOld"]["expr"]


@pytest.mark.parametrize(("level", "bound"), [("landlock", 1), ("namespaces", 2), ("vm", 1)])
def test_the_sandbox_must_hold_at_the_level_that_is_asked_for(level, bound):
    found = rules(
        grading={"level": level, "seccompProfile": "a"},
        workers={"grade": {"runtimeClassName": "gvisor"}},
    )
    expression = found["AsapSandboxMissing"]["expr"]
    assert 'service="asap-grade"' in expression  # other processes have the gauge, too, and it is 0
    assert expression.endswith(f"< {bound}")


def test_services_are_those_that_the_page_names():
    for name in ("demo", "gpu-small", "gpu-prod"):
        assert f"`values-{name}.yaml`" in DOCUMENT
        assert (CHART / f"values-{name}.yaml").exists()
    for secret in re.findall(r"create secret generic (\S+)", DOCUMENT):
        assert secret in json.dumps(render(profile("gpu-prod"))), secret
