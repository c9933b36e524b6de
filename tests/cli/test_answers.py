from __future__ import annotations

import httpx
import pytest

from asap.errors import (
    Conflict,
    CostCapReached,
    Forbidden,
    InvalidInput,
    NotFound,
    Overloaded,
    StorageFull,
    Unauthorized,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from asap_cli.answers import Job, one_line, parse, refusal

REQUEST = httpx.Request("GET", "http://server/jobs")
JOB = {"id": "a", "phase": "done", "created_at": 1.0, "finished_at": None, "total": 0, "counts": []}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, InvalidInput), (402, CostCapReached), (403, Forbidden), (404, NotFound),
        (409, Conflict), (413, InvalidInput), (415, InvalidInput), (422, InvalidInput),
        (429, Overloaded), (500, UpstreamError), (502, UpstreamError), (503, UpstreamUnavailable),
        (504, UpstreamTimeout), (507, StorageFull),
    ],
)  # fmt: skip
def test_a_problem_becomes_the_error_it_was(status, kind):
    problem = {"code": "some-code", "detail": "a\x1b[31m\nsentence", "retry_after_s": 3, "new": 1}
    error = refusal(httpx.Response(status, json=problem, request=REQUEST), "http://server")
    assert type(error) is kind
    assert (error.problem_code, error.detail) == ("some-code", "a␛[31m sentence")
    assert error.context == {"retry_after_s": 3}


def test_who_has_no_key_is_told_where_it_is_read():
    problem = {"code": "unauthorized", "detail": "a key is needed"}
    error = refusal(httpx.Response(401, json=problem, request=REQUEST), "http://server")
    assert type(error) is Unauthorized
    assert error.detail == "a key is needed; this command sends what ASAP_API_KEY holds"


@pytest.mark.parametrize(
    ("status", "kind"), [(404, UpstreamError), (307, UpstreamError), (503, UpstreamUnavailable)]
)
def test_another_server_is_named_with_its_status(status, kind):
    error = refusal(httpx.Response(status, text="<html>", request=REQUEST), "http://server")
    assert type(error) is kind
    assert error.detail == (
        f"http://server answers GET /jobs with {status}, and not as an ASAP server would"
    )


def test_members_of_a_newer_server_are_ignored_and_nonsense_is_refused():
    job = parse(Job, Job.model_validate(JOB | {"new": 1}).model_dump_json(), "http://server")
    assert job.phase == "done"
    with pytest.raises(UpstreamError, match="is the address right"):
        parse(Job, b"{}", "http://server")


def test_one_line_is_one_harmless_line():
    assert one_line(" a\n b\t\x1b]0;x\x07 ") == "a b ␛]0;x␇"
