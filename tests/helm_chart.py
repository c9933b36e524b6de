"""The chart rendered offline: profiles, a site's own file, toggles, and objects as plain data."""

from __future__ import annotations

import copy
import re
from functools import cache
from pathlib import Path

import helm_python
import yaml

REPOSITORY = Path(__file__).parent.parent
CHART = REPOSITORY / "deploy" / "helm"
PROFILES = ("demo", "gpu-small", "gpu-prod")
NAMESPACE, RELEASE = "team", "asap"


@cache
def chart():
    return helm_python.Chart.load(str(CHART))


def merged(*values):
    """One over the other, maps merged, all else replaced: as several files given to Helm."""
    result = {}
    for part in values:
        for key, value in part.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else copy.deepcopy(value)
    return result


@cache
def _text(path):
    return yaml.safe_load(path.read_text())


def site():
    """The file of one's own that docs/operations.md shows beside the profile of production."""
    page = (REPOSITORY / "docs" / "operations.md").read_text()
    block = re.search(r"```yaml\n# my-values\.yaml\n(.*?)```", page, re.DOTALL)
    return yaml.safe_load(block[1])


def profile(name):
    """Values of a profile, complete: production with the site's file."""
    values = _text(CHART / f"values-{name}.yaml")
    return merged(values, site()) if name == "gpu-prod" else merged(values)


def changed(name, *changes):
    """Values of a profile and of toggles (see TOGGLES) or maps of values over it."""
    parts = (TOGGLES[change] if isinstance(change, str) else change for change in changes)
    return merged(profile(name), *parts)


def files(values):
    """Template to its text. Raises HelmError."""
    return chart().render(values, name=RELEASE, namespace=NAMESPACE)


def render(values):
    """All objects, in the order of their templates."""
    texts = files(values)
    found = [texts[path] for path in sorted(texts) if path.endswith(".yaml")]
    return [one for text in found for one in yaml.load_all(text, yaml.CSafeLoader) if one]


def named(objects, kind, name):
    """The object of this kind and name, without the release's name before it."""
    [found] = [
        one
        for one in objects
        if one["kind"] == kind and one["metadata"]["name"].removeprefix(f"{RELEASE}-") == name
    ]
    return found


ANYWHERE = {"peers": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}
STORE = {"blobs": {"url": "s3://bucket/asap"}, "network": {"blobs": ANYWHERE}}
MODEL = {"source": "s3://bucket/asap/models/one", "sha256": "5" * 64}
TOGGLES = {
    "bucket": STORE,
    "trainer": merged(
        STORE,
        {"workers": {"trainer": {"enabled": True}}, "network": {"apiServer": ANYWHERE}},
    ),
    "several nodes": {"training": {"multiNode": True}},
    "evaluator": merged(
        STORE,
        {
            "config": {"ASAP_EVALUATOR__BASE_URL": "http://asap-serving-one:8000/v1"},
            "workers": {"generate": {"enabled": True}, "grade": {"enabled": True}},
        },
    ),
    "grade in namespaces": merged(
        STORE,
        {
            "workers": {"grade": {"enabled": True}},
            "grading": {"level": "namespaces", "seccompProfile": "asap/grade.json"},
        },
    ),
    "grade in a machine": merged(
        STORE,
        {
            "workers": {"grade": {"enabled": True, "runtimeClassName": "gvisor"}},
            "grading": {"level": "vm"},
        },
    ),
    "serving": merged(
        STORE,
        {
            "modelCache": {"create": True},
            "serving": {
                "models": {
                    "one": {"weights": MODEL, "replicas": 2, "args": ["--max-model-len=8192"]},
                    "two": {"weights": MODEL, "gpu": {"resource": "nvidia.com/mig-3g.40gb"}},
                }
            },
        },
    ),
    "a cache that is there": {"modelCache": {"create": False, "existingClaim": "cache"}},
    "hpa": merged(
        STORE,
        {
            "gateway": {"autoscaling": {"kind": "hpa"}},
            "workers": {"anchor": {"autoscaling": {"kind": "hpa", "target": 100}}},
        },
    ),
    "keda by postgresql": {
        "workers": {"surprisal": {"autoscaling": {"kind": "keda", "min": 0}}},
        "keda": {"trigger": "postgresql", "connection": {"name": "keda"}},
    },
    "keda by prometheus": {
        "workers": {"surprisal": {"autoscaling": {"kind": "keda", "min": 0}}},
        "keda": {"trigger": "prometheus", "prometheusAddress": "http://prometheus:9090"},
    },
    "a database outside": {
        "builtin": {"postgres": {"enabled": False}},
        "secrets": {"database": {"name": "db"}},
        "network": {"database": ANYWHERE},
    },
    "a scorer elsewhere": {
        "secrets": {"scorer": {"name": "scorer"}},
        "config": {
            "ASAP_SURPRISAL__BACKEND": "vllm",
            "ASAP_SURPRISAL__BASE_URL": "http://scorer:8000/v1",
            "ASAP_SURPRISAL__MODEL": "team/scorer",
        },
        "workers": {"surprisal": {"gpu": {"count": 0}, "weights": {"source": ""}}},
    },
    "no policies": {"production": False, "network": {"enabled": False}},
    "names of the LLM": {
        "config": {"ASAP_LLM__MODEL": "large"},
        "network": {"llm": {"peers": [], "fqdns": ["llm.example.com", "*.example.org"]}},
    },
    "ingress": {
        "ingress": {
            "enabled": True,
            "className": "nginx",
            "host": "asap.example.com",
            "tlsSecret": "asap-tls",
            "annotations": {"cert-manager.io/cluster-issuer": "main"},
        }
    },
    "route": {
        "httpRoute": {
            "enabled": True,
            "parentRefs": [{"name": "main", "namespace": "gateways"}],
            "hostnames": ["asap.example.com"],
        }
    },
    "monitoring": {
        "monitoring": {
            "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
            "rules": {
                "enabled": True,
                "costPerHour": 12.5,
                "certificates": True,
                "backupCronJob": "asap-backup",
            },
            "dashboards": {"enabled": True},
        }
    },
    "no monitoring": {
        "monitoring": {
            "serviceMonitor": {"enabled": False},
            "rules": {"enabled": False},
            "dashboards": {"enabled": False},
        }
    },
    "no priority classes": {"priority": {"create": False}},
    "placement": {
        "defaults": {
            "nodeSelector": {"pool": "gpu"},
            "tolerations": [{"key": "gpu", "operator": "Exists"}],
            "affinity": {"nodeAffinity": {}},
            "podLabels": {"team": "research"},
            "podAnnotations": {"note": "yes"},
            "extraEnv": [{"name": "LANG", "value": "C.UTF-8"}],
            "extraVolumes": [{"name": "ca", "configMap": {"name": "ca"}}],
            "extraVolumeMounts": [{"name": "ca", "mountPath": "/etc/ca", "readOnly": True}],
            "extraEgress": [{"to": [{"ipBlock": {"cidr": "10.1.2.3/32"}}]}],
        }
    },
    "registry": {"image": {"registry": "registry.example.com/team", "pullSecrets": ["pull"]}},
    "further objects": {
        "extraObjects": [
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "ca"}, "data": {}}
        ]
    },
    "another name": {"fullnameOverride": "cot"},
    "another port": {"gateway": {"service": {"type": "LoadBalancer", "port": 8080}}},
    "all secrets": {
        "secrets": {
            "llm": {"name": "llm"},
            "webhooks": {"name": "hooks"},
            "otlp": {"name": "otlp"},
            "blobs": {"name": "s3"},
        },
        "network": {"webhooks": ANYWHERE, "otlp": ANYWHERE},
    },
}
"""Every switch of the chart once, as values over a profile."""
CASES = [(name, None) for name in PROFILES] + [(name, t) for name in PROFILES for t in TOGGLES]


def case_values(case):
    """Values of one of CASES."""
    name, toggle = case
    return changed(name, toggle) if toggle else profile(name)


def case_name(case):
    return f"{case[0]}: {case[1] or 'as it is'}"
