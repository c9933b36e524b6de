from __future__ import annotations

import copy
import itertools

import pytest
from helm_python import HelmRenderError

from asap_trainer.manifest import selector
from asap_trainer.settings import KubernetesSettings, LaunchSettings, TrainerSettings
from helm_chart import changed, merged, profile, render
from kube_network import End, allowed


def pod(component):
    return End({"app.kubernetes.io/name": "asap", "app.kubernetes.io/instance": "asap",
                "app.kubernetes.io/component": component})  # fmt: skip


OURS = ("gateway", "anchor", "surprisal", "trainer", "generate", "grade", "migrate", "test",
        "training", "serving-student", "serving-one", "serving-two")  # fmt: skip
PODS = {name: pod(name) for name in OURS}
PLACES = {
    "database": (End(address="10.20.0.10"), 5432),
    "queue": (End(address="10.20.0.20"), 6379),
    "blobs": (End(address="10.30.7.7"), 443),
    "internet": (End(address="93.184.216.34"), 443),
    "api server": (End(address="10.0.0.1"), 6443),
    "metadata": (End(address="169.254.169.254"), 80),
    "metadata over TLS": (End(address="169.254.169.254"), 443),
    "neighbour": (End({"app": "other"}), 8000),
    "other namespace": (End({"app": "other"}, namespace="theirs"), 8000),
}
INGRESS = End({"app": "nginx"}, namespace="ingress-nginx")
PROMETHEUS = End({"app": "prometheus"}, namespace="monitoring")
DNS = End({"k8s-app": "kube-dns"}, namespace="kube-system")
SERVED = ("serving-student", "serving-one", "serving-two")
STAGES = ("anchor", "surprisal", "trainer", "generate", "grade")

MAY_REACH = {
    "gateway": {"database", "queue", "blobs", *SERVED},
    # Both ask the whole internet for the LLM and the weights here, and the store is a part of it.
    "anchor": {"database", "queue", "internet", "blobs"},
    "surprisal": {"database", "queue", "internet", "blobs"},
    "trainer": {"database", "queue", "blobs", "api server"},
    "training": {"blobs", "internet"},
    "generate": {"database", "queue", "blobs", *SERVED},
    "grade": {"database", "queue", "blobs"},
    "migrate": {"database"},
    "test": {"gateway"},
    "serving-student": {"blobs"},
    "serving-one": {"blobs"},
    "serving-two": {"blobs"},
}
"""Of a site as docs/operations.md describes it; all other pairs are refused."""


@pytest.fixture(scope="module")
def objects():
    return render(changed("gpu-prod", "serving", {"network": {"blobs": {"peers": [
        {"ipBlock": {"cidr": "10.30.0.0/16"}}]}}}))  # fmt: skip


def targets():
    for name, end in PODS.items():
        yield name, end, 8000 if name in (*SERVED, "gateway") else 9100
    for name, (end, port) in PLACES.items():
        yield name, end, port


def reached(objects, source):
    return {name for name, end, port in targets() if allowed(objects, PODS[source], end, port)}


@pytest.mark.parametrize("source", OURS)
def test_a_pod_reaches_what_it_needs_and_nothing_else(objects, source):
    assert reached(objects, source) == MAY_REACH[source]


def test_everybody_is_in_the_table(objects):
    components = {
        one["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]
        for one in objects
        if one["kind"] in ("Deployment", "Job")
    }
    assert components | {"test", "training"} == set(OURS) == set(MAY_REACH)


def test_who_comes_in_from_outside(objects):
    strangers = {
        "ingress": INGRESS,
        "prometheus": PROMETHEUS,
        "neighbour": End({"app": "x"}),
        "far": End(address="203.0.113.9"),
        "theirs": End({}, namespace="theirs"),
    }
    let_in = {
        (who, name, port)
        for who, stranger in strangers.items()
        for name in OURS
        for port in (8000, 9100, 22)
        if allowed(objects, stranger, PODS[name], port)
    }
    assert let_in == (
        {("ingress", "gateway", 8000), ("prometheus", "gateway", 8000)}
        | {("prometheus", name, 9100) for name in STAGES}
        | {("prometheus", name, 8000) for name in SERVED}
    )


def test_only_gateway_and_evaluator_reach_a_served_model(objects):
    for name in SERVED:
        inside = {one for one in OURS if allowed(objects, PODS[one], PODS[name], 8000)}
        assert inside == {"gateway", "generate"}


@pytest.mark.parametrize("source", OURS)
def test_names_are_asked_of_the_clusters_name_servers_only(objects, source):
    assert allowed(objects, PODS[source], DNS, 53, "UDP")
    assert allowed(objects, PODS[source], DNS, 53, "TCP")
    assert not allowed(objects, PODS[source], DNS, 80)
    assert not allowed(objects, PODS[source], End(address="8.8.8.8"), 53, "UDP")


def test_a_pod_of_another_release_is_a_stranger(objects):
    other = End({**PODS["gateway"].labels, "app.kubernetes.io/instance": "other"})
    for name in OURS:
        assert not allowed(objects, other, PODS[name], 8000)


def test_built_in_databases_let_in_their_users_and_reach_nobody():
    found = render(changed("demo", "evaluator", "trainer"))
    ends = {"postgres": (pod("postgres"), 5432), "redis": (pod("redis"), 6379)}
    users = {
        name: {one for one in OURS if allowed(found, PODS[one], end, port)}
        for name, (end, port) in ends.items()
    }
    assert users == {
        "postgres": {"gateway", *STAGES, "migrate"},
        "redis": {"gateway", *STAGES},
    }
    for end, _ in ends.values():
        for name, target, port in targets():
            assert not allowed(found, end, target, port), name
        assert not allowed(found, end, End(address="93.184.216.34"), 443)


def test_pods_of_a_training_run_find_each_other_only_where_runs_take_several_nodes():
    training = PODS["training"]
    assert not allowed(render(profile("gpu-prod")), training, training, 29500)
    assert allowed(render(changed("gpu-prod", "several nodes")), training, training, 29500)


def test_training_jobs_carry_the_labels_that_the_policies_choose():
    cluster = KubernetesSettings(instance="asap", image="x")
    settings = TrainerSettings(
        trainer=LaunchSettings(launcher="kubernetes", kubernetes=cluster),
        blobs={"url": "s3://bucket/asap"},
    )
    assert selector(settings) == PODS["training"].labels


def test_further_rules_open_what_they_say():
    found = render(changed("gpu-prod", "placement"))
    place = End(address="10.1.2.3")
    assert allowed(found, PODS["grade"], place, 1234)
    assert not allowed(render(profile("gpu-prod")), PODS["grade"], place, 1234)


@pytest.mark.parametrize(
    ("cidr", "reached"),
    [
        ("0.0.0.0/0", False),
        ("128.0.0.0/1", False),
        ("169.0.0.0/8", False),
        ("169.254.0.0/15", False),
        ("10.0.0.0/8", None),
        ("169.255.0.0/16", None),
    ],
)
def test_no_range_holds_the_metadata_address(cidr, reached):
    values = {"network": {"llm": {"peers": [{"ipBlock": {"cidr": cidr}}], "ports": [80, 443]}}}
    found = render(changed("gpu-prod", values))
    assert not allowed(found, PODS["anchor"], PLACES["metadata"][0], 80)
    blocks = [
        peer["ipBlock"]
        for one in found
        if one["kind"] == "NetworkPolicy" and one["metadata"]["name"] == "asap-anchor"
        for rule in one["spec"]["egress"]
        for peer in rule["to"]
        if peer.get("ipBlock", {}).get("cidr") == cidr
    ]
    [block] = blocks
    assert ("except" in block) is (reached is False)


@pytest.mark.parametrize(
    "cidr", ["169.254.169.254/32", "169.254.0.0/16", "169.254.169.0/24", "fd00:ec2::254/128"]
)
def test_the_metadata_address_itself_is_refused(cidr):
    values = {"network": {"llm": {"peers": [{"ipBlock": {"cidr": cidr}}]}}}
    with pytest.raises(HelmRenderError, match=r"network\.llm\.peers: .* metadata address"):
        render(changed("gpu-prod", values))


def test_ranges_of_version_6_are_without_it_too():
    for cidr in ("::/0", "fc00::/7", "fd00::/8"):
        values = {"network": {"llm": {"peers": [{"ipBlock": {"cidr": cidr}}], "ports": [80]}}}
        found = render(changed("gpu-prod", values))
        assert not allowed(found, PODS["anchor"], End(address="fd00:ec2::254"), 80)
        assert allowed(found, PODS["anchor"], End(address="fd00:1::1"), 80)


def test_each_policy_is_needed(objects):
    """Without any one of them the matrix is another."""
    policies = [one for one in objects if one["kind"] == "NetworkPolicy"]

    def matrix(without):
        left = [one for one in policies if one is not without]
        pairs = itertools.product(OURS, targets())
        return {(a, b) for a, (b, end, port) in pairs if allowed(left, PODS[a], end, port)}

    whole = matrix(None)
    assert len(policies) > 10
    for one in policies:
        name = one["metadata"]["name"]
        if name == "asap-default":
            left = [other for other in policies if other is not one]
            assert not allowed(left, PODS["gateway"], DNS, 53, "UDP")
            continue
        assert matrix(one) != whole, name


def test_a_hole_in_a_policy_is_seen(objects):
    broken = copy.deepcopy(objects)
    [policy] = [one for one in broken if one["kind"] == "NetworkPolicy"
                and one["metadata"]["name"] == "asap-grade"]  # fmt: skip
    policy["spec"]["egress"].append({})
    assert reached(broken, "grade") - MAY_REACH["grade"] >= {"internet", "metadata"}


def test_host_names_of_the_llm_are_for_the_anchor_alone():
    found = render(changed("gpu-prod", "names of the LLM"))
    [policy] = [one for one in found if one["kind"] == "CiliumNetworkPolicy"]
    assert policy["spec"]["endpointSelector"]["matchLabels"] == PODS["anchor"].labels
    names = policy["spec"]["egress"][1]["toFQDNs"]
    assert names == [{"matchName": "llm.example.com"}, {"matchPattern": "*.example.org"}]
    assert not allowed(found, PODS["anchor"], PLACES["internet"][0], 443)


def test_without_policies_there_are_none():
    found = render(merged(profile("demo"), {"network": {"enabled": False}}))
    assert not [one for one in found if one["kind"] == "NetworkPolicy"]
