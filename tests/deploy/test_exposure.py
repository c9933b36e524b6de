"""What an Ingress or a route lets through, against the paths that the gateway has."""

from __future__ import annotations

import pytest

from asap_cli.roles import AllSettings
from asap_cli.serve import open_gateway
from asap_gateway.app import create_app
from asap_runtime.host import StageHost, open_database
from helm_chart import changed, named, render

INSIDE = {"/healthz", "/readyz", "/metrics"}
"""Of the kubelet and of Prometheus, which ask the pod."""


@pytest.fixture
def paths(tmp_path):
    """All paths of the gateway."""
    settings = AllSettings(home=tmp_path)
    database = open_database(settings)
    app = create_app(open_gateway(settings, StageHost.open(settings, database, [])))
    yield {route.path for route in app.routes}
    database.close()


def prefixes(values):
    """Path prefixes that lead to the gateway, by kind of object."""
    objects = render(values)
    [rule] = named(objects, "Ingress", "gateway")["spec"]["rules"]
    found = rule["http"]["paths"]
    assert {one["pathType"] for one in found} == {"Prefix"}
    assert {one["backend"]["service"]["name"] for one in found} == {"asap-gateway"}
    [rule] = named(objects, "HTTPRoute", "gateway")["spec"]["rules"]
    matches = [one["path"] for one in rule["matches"]]
    assert {one["type"] for one in matches} == {"PathPrefix"}
    return {"Ingress": [one["path"] for one in found], "HTTPRoute": [m["value"] for m in matches]}


def leads(prefix, path):
    """As Kubernetes reads a prefix: by whole elements of the path."""
    return path == prefix or path.startswith(prefix.rstrip("/") + "/")


@pytest.mark.parametrize("kind", ["Ingress", "HTTPRoute"])
def test_callers_reach_the_whole_api_and_neither_probes_nor_metrics(paths, kind):
    allowed = prefixes(changed("gpu-prod", "ingress", "route"))[kind]
    assert paths > INSIDE
    reached = {path for path in paths if any(leads(prefix, path) for prefix in allowed)}
    assert reached == paths - INSIDE
    for prefix in allowed:
        assert any(leads(prefix, path) for path in paths), f"{prefix} leads nowhere"


def test_a_prefix_is_of_whole_elements():
    assert leads("/jobs", "/jobs/7/result")
    assert leads("/", "/metrics")
    assert not leads("/models", "/modelsize")


def test_only_the_gateway_may_have_a_service_for_outside():
    for toggle in ("serving", "evaluator", "another port"):
        services = [one for one in render(changed("demo", toggle)) if one["kind"] == "Service"]
        kinds = {one["metadata"]["name"]: one["spec"].get("type", "ClusterIP") for one in services}
        assert len(kinds) >= 5
        outside = {name for name, kind in kinds.items() if kind != "ClusterIP"}
        assert outside == ({"asap-gateway"} if toggle == "another port" else set())
