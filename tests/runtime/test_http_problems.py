from __future__ import annotations

import json

from asap.errors import InvalidInput, Overloaded
from asap_runtime.http_problems import answer, problem
from asap_runtime.problems import describe


def test_a_problem_is_an_answer_with_the_path_it_answers():
    refusal = answer("/jobs", problem(413, "payload-too-large", "Payload too large", "too much"))
    assert (refusal.status_code, refusal.media_type) == (413, "application/problem+json")
    assert json.loads(refusal.body) == {
        "type": "urn:asap:problem:payload-too-large",
        "title": "Payload too large",
        "status": 413,
        "detail": "too much",
        "code": "payload-too-large",
        "instance": "/jobs",
    }
    assert "retry-after" not in refusal.headers


def test_when_to_come_again_is_a_whole_second_or_more():
    for seconds, header in ((0.2, "1"), (7.4, "7"), (30, "30")):
        refusal = answer("/", describe(Overloaded("full", retry_after_s=seconds)))
        assert refusal.headers["retry-after"] == header
        assert json.loads(refusal.body)["retry_after_s"] == seconds


def test_below_v1_a_problem_has_the_shape_of_openai():
    unknown = InvalidInput("unknown field 'x'", code="unknown-field", field="x")
    refusal = answer("/v1/completions", describe(unknown))
    assert (refusal.status_code, refusal.media_type) == (400, "application/json")
    assert json.loads(refusal.body) == {
        "error": {
            "message": "unknown field 'x'",
            "type": "invalid_request_error",
            "param": "x",
            "code": "unknown-field",
        }
    }
    busy = answer("/v1/models", describe(Overloaded("full", retry_after_s=3)))
    assert (busy.status_code, busy.headers["retry-after"]) == (429, "3")
    assert json.loads(busy.body)["error"]["type"] == "rate_limit_error"
    broken = answer("/v1/models", problem(503, "not-ready", "x", "y"))
    assert json.loads(broken.body)["error"]["type"] == "server_error"
    assert "error" not in json.loads(answer("/v1x", problem(503, "not-ready", "x", "y")).body)
