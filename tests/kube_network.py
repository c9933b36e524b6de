"""Who may open a connection to whom, as the API's rules for NetworkPolicies say it.

Ends are pods with labels in a namespace, or addresses outside of the cluster. A pod that some
policy of a direction chooses may do in that direction only what one of those policies allows.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field


@dataclass(frozen=True)
class End:
    """A pod, or an address when it has one."""

    labels: dict[str, str] = field(default_factory=dict)
    namespace: str = "team"
    address: str | None = None


def allowed(objects, source, target, port, protocol="TCP"):
    """Whether the source may open a connection to this port of the target."""
    policies = [one for one in objects if one["kind"] == "NetworkPolicy"]
    leaves = _direction(policies, "Egress", source, target, port, protocol)
    return leaves and _direction(policies, "Ingress", target, source, port, protocol)


def _direction(policies, direction, own, other, port, protocol):
    if own.address is not None:
        return True
    chosen = [
        one
        for one in policies
        if direction in one["spec"]["policyTypes"]
        and one["metadata"]["namespace"] == own.namespace
        and _matches(one["spec"]["podSelector"], own.labels)
    ]
    if not chosen:
        return True
    key, peers = ("egress", "to") if direction == "Egress" else ("ingress", "from")
    return any(
        _opens(rule, peers, other, port, protocol, one["metadata"]["namespace"])
        for one in chosen
        for rule in one["spec"].get(key) or []
    )


def _opens(rule, peers, other, port, protocol, home):
    """An empty list of peers or ports means all of them."""
    ports = rule.get("ports") or []
    right_port = not ports or any(
        one.get("port", port) == port and one.get("protocol", "TCP") == protocol for one in ports
    )
    places = rule.get(peers) or []
    return right_port and (not places or any(_is_at(place, other, home) for place in places))


def _is_at(place, other, home):
    if block := place.get("ipBlock"):
        if other.address is None:
            return False
        address = ipaddress.ip_address(other.address)
        inside = address in ipaddress.ip_network(block["cidr"])
        return inside and not any(
            address in ipaddress.ip_network(out) for out in block.get("except", [])
        )
    if other.address is not None:
        return False
    spaces = place.get("namespaceSelector")
    here = {"kubernetes.io/metadata.name": other.namespace}
    right_space = other.namespace == home if spaces is None else _matches(spaces, here)
    return right_space and _matches(place.get("podSelector", {}), other.labels)


def _matches(selector, labels):
    unknown = set(selector) - {"matchLabels", "matchExpressions"}
    assert not unknown, unknown
    for one in selector.get("matchExpressions", []):
        assert one["operator"] == "In", one
    return all(
        labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()
    ) and all(
        labels.get(one["key"]) in one["values"] for one in selector.get("matchExpressions", [])
    )
