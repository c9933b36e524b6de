"""Small schemas of the custom kinds that the chart renders: what we write of them, and no more.

Closed, so that a field in the wrong place fails as it does for the kinds of Kubernetes itself.
"""

from __future__ import annotations

TEXT = {"type": "string", "minLength": 1}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}


def closed(required, **optional):
    """An object of these fields and no others."""
    return {
        "type": "object",
        "additionalProperties": False,
        "required": list(required),
        "properties": {**required, **optional},
    }


def listed(items, least=1):
    return {"type": "array", "minItems": least, "items": items}


METADATA = closed({"name": TEXT, "namespace": TEXT, "labels": TEXTS}, annotations=TEXTS)
SELECTOR = closed(
    {"matchLabels": TEXTS},
    matchExpressions=listed(
        closed({"key": TEXT, "operator": {"const": "In"}, "values": listed(TEXT)})
    ),
)
ENTRY = closed({"name": TEXT, "key": TEXT})
DURATION = {"type": "string", "pattern": "^[0-9]+(s|m|h)$"}
BEHAVIOR = closed(
    {
        "scaleDown": closed(
            {
                "stabilizationWindowSeconds": {"type": "integer", "minimum": 0, "maximum": 3600},
                "policies": listed(
                    closed({"type": {"enum": ["Pods", "Percent"]}, "value": COUNT,
                            "periodSeconds": {"type": "integer", "minimum": 1, "maximum": 1800}})
                ),
            }
        )
    }
)  # fmt: skip
PROMETHEUS_TRIGGER = closed(
    {
        "type": {"const": "prometheus"},
        "metricType": {"const": "AverageValue"},
        "metadata": closed(
            {
                "serverAddress": TEXT,
                "query": TEXT,
                "threshold": TEXT,
                "activationThreshold": TEXT,
                "ignoreNullValues": {"const": "false"},
            }
        ),
    }
)
POSTGRESQL_TRIGGER = closed(
    {
        "type": {"const": "postgresql"},
        "metricType": {"const": "AverageValue"},
        "metadata": closed(
            {"query": TEXT, "targetQueryValue": TEXT, "activationTargetQueryValue": TEXT}
        ),
        "authenticationRef": closed({"name": TEXT}),
    }
)
PORTS = listed(
    closed(
        {"ports": listed(closed({"port": TEXT, "protocol": {"enum": ["TCP", "UDP", "ANY"]}}))},
        rules=closed({"dns": listed(closed({"matchPattern": TEXT}))}),
    )
)

SPECS = {
    ("keda.sh/v1alpha1", "ScaledObject"): closed(
        {
            "scaleTargetRef": closed({"name": TEXT}),
            "minReplicaCount": COUNT,
            "maxReplicaCount": {"type": "integer", "minimum": 1},
            "triggers": listed({"oneOf": [PROMETHEUS_TRIGGER, POSTGRESQL_TRIGGER]}),
        },
        pollingInterval=COUNT,
        cooldownPeriod=COUNT,
        fallback=closed({"failureThreshold": COUNT, "replicas": COUNT}),
        advanced=closed({"horizontalPodAutoscalerConfig": closed({"behavior": BEHAVIOR})}),
    ),
    ("keda.sh/v1alpha1", "TriggerAuthentication"): closed(
        {"secretTargetRef": listed(closed({"parameter": TEXT, "name": TEXT, "key": TEXT}))}
    ),
    ("monitoring.coreos.com/v1", "ServiceMonitor"): closed(
        {
            "selector": SELECTOR,
            "endpoints": listed(
                closed(
                    {"port": TEXT, "path": {"const": "/metrics"}, "interval": DURATION},
                    authorization=closed({"credentials": ENTRY}),
                )
            ),
        }
    ),
    ("monitoring.coreos.com/v1", "PrometheusRule"): closed(
        {
            "groups": listed(
                closed(
                    {
                        "name": TEXT,
                        "rules": listed(
                            closed(
                                {
                                    "alert": {"type": "string", "pattern": "^Asap[A-Z]\\w+$"},
                                    "expr": TEXT,
                                    "labels": closed(
                                        {"severity": {"enum": ["warning", "critical"]}}
                                    ),
                                    "annotations": closed({"summary": TEXT}),
                                },
                                **{"for": DURATION},
                            )
                        ),
                    }
                )
            )
        }
    ),
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): closed(
        {
            "parentRefs": listed(closed({"name": TEXT}, namespace=TEXT, sectionName=TEXT)),
            "rules": listed(
                closed(
                    {
                        "matches": listed(
                            closed({"path": closed({"type": {"enum": ["PathPrefix", "Exact"]},
                                                    "value": TEXT})})
                        ) | {"maxItems": 8},  # early versions of the API take no more
                        "backendRefs": listed(
                            closed({"name": TEXT, "port": {"type": "integer", "minimum": 1}})
                        ),
                    }
                )
            ),
        },
        hostnames=listed(TEXT),
    ),
    ("cilium.io/v2", "CiliumNetworkPolicy"): closed(
        {
            "endpointSelector": closed({"matchLabels": TEXTS}),
            "egress": listed(
                closed(
                    {"toPorts": PORTS},
                    toEndpoints=listed(closed({"matchLabels": TEXTS})),
                    toFQDNs=listed(
                        {"oneOf": [closed({"matchName": TEXT}), closed({"matchPattern": TEXT})]}
                    ),
                )
            ),
        }
    ),
}  # fmt: skip


def schema_of(one):
    """The whole schema of a custom object. Raises KeyError for a kind that nobody described."""
    group, kind = one["apiVersion"], one["kind"]
    spec = SPECS[group, kind]
    own = {"apiVersion": {"const": group}, "kind": {"const": kind}}
    return closed({**own, "metadata": METADATA, "spec": spec})
