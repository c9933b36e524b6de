"""Errors of the cluster's API as ours; whole calls are tested by those who make them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from asap.errors import AsapError, CapacityError, Conflict, Misconfigured, NotFound
from asap_runtime.kubernetes_api import answer_of, connect, joined, translated

QUOTA = "exceeded quota: gpus, used: 8"


def error_of(status, message="planted") -> AsapError:
    from kubernetes.client.exceptions import ApiException

    error = ApiException(status=status, reason="x")
    error.body = json.dumps({"kind": "Status", "message": message})
    with pytest.raises(AsapError) as raised, translated("the settings"):
        raise error
    return raised.value


@pytest.mark.parametrize(
    ("status", "message", "kind", "code"),
    [
        (400, "planted", Misconfigured, "misconfigured"),
        (401, "planted", CapacityError, "cluster-unavailable"),
        (403, "planted", CapacityError, "cluster-unavailable"),
        (403, QUOTA, CapacityError, "quota-refused"),
        (404, "planted", NotFound, "not-found"),
        (409, "planted", Conflict, "job-finished"),
        (410, "planted", Conflict, "job-finished"),
        (422, "planted", Misconfigured, "misconfigured"),
        (429, "planted", CapacityError, "cluster-unavailable"),
        (500, "planted", CapacityError, "cluster-unavailable"),
    ],
)
def test_an_answer_is_an_error_of_ours_without_its_words(status, message, kind, code):
    error = error_of(status, message)
    assert (type(error), error.problem_code) == (kind, code)
    assert message not in str(error)
    assert answer_of(error) == (status, message)


@pytest.mark.parametrize("body", [None, "", "<html>", "[]"])
def test_an_answer_without_words_has_none(body):
    error = error_of(500)
    error.__cause__.body = body
    assert answer_of(error) == (500, "")


def test_no_answer_has_no_status():
    with pytest.raises(CapacityError) as raised, translated("the settings"):
        raise ConnectionResetError
    assert raised.value.retryable
    assert answer_of(raised.value) == (0, "")


def test_other_errors_are_their_own():
    with pytest.raises(ZeroDivisionError), translated("the settings"):
        1 / 0  # noqa: B018


@pytest.mark.parametrize("kubeconfig", [None, "missing"])
def test_what_is_expected_is_said_where_there_is_no_cluster(kubeconfig, monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(Misconfigured, match="expected a file"):
        connect(kubeconfig, expected="a file")


def test_a_kubeconfig_that_cannot_be_read_is_said_so(tmp_path):
    file = tmp_path / "config"
    file.write_text("clusters: [")
    with pytest.raises(Misconfigured, match="expected a file"):
        connect(str(file), expected="a file")


def test_a_client_that_is_not_installed_is_said_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(Misconfigured, match="extra 'kubernetes'"):
        connect(None, expected="a file")


def test_labels_are_joined():
    assert joined({"a": "b", "c": "d"}) == "a=b,c=d"


def test_the_client_is_imported_when_it_is_needed():
    code = "import sys, asap_runtime.kubernetes_api; sys.exit('kubernetes' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
