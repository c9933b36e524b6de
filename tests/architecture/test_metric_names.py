"""Metrics are named by rule, in one file, and each of them is fed somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import Counter, Gauge, Histogram

from asap_runtime import telemetry

REPOSITORY = Path(__file__).parent.parent.parent
SOURCES = [
    path
    for folder in ("core", "gateway", "services", "cli")
    for path in sorted((REPOSITORY / folder).rglob("*.py"))
]
BOUNDED = {
    "stage", "outcome", "status", "part", "op", "route", "model", "direction", "reason", "upstream",
    "benchmark", "grade"
}  # fmt: skip
UNITS = ("_seconds", "_tokens", "_rows", "_attempts")
METRICS = {
    name: value
    for name, value in vars(telemetry).items()
    if isinstance(value, Counter | Gauge | Histogram)
}


def test_the_table_of_metrics_is_found():
    assert len(METRICS) >= 20


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_has_prefix_help_and_bounded_labels(name):
    metric = METRICS[name]
    assert re.fullmatch(r"asap_[a-z]+(_[a-z]+)*", metric._name)
    assert metric._documentation
    assert set(metric._labelnames) <= BOUNDED
    if isinstance(metric, Histogram):
        assert metric._name.endswith(UNITS)


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_is_fed_by_somebody(name):
    fed = re.compile(rf"\b{name}\b[^\n]*\.(inc|observe|set|time|track_inprogress)\(")
    texts = [path.read_text() for path in SOURCES]
    assert any(fed.search(text) for text in texts), f"nothing feeds {name}"


def test_nobody_else_makes_metrics():
    makers = [
        path.name
        for path in SOURCES
        if re.search(r"prometheus_client import .*(Counter|Gauge|Histogram)", path.read_text())
    ]
    assert makers == ["telemetry.py"]
