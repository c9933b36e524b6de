from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from asap.eval_config import EvalConfig
from asap.eval_items import EvalData, EvalItem
from asap.problems import Problem
from asap.runs import Launch, TrainRun
from asap.train_config import TrainConfig
from asap_gateway.evaluation_schemas import EvaluationBody
from asap_gateway.schemas import (
    EvaluateRequest,
    ItemBody,
    JobBody,
    JobRequest,
    Submission,
    TrainBody,
    TrainRequest,
)
from asap_runtime.phases import JobFacts, StageCount
from asap_runtime.views import ErrorSummary, ItemView, JobView

SUBMISSION = TypeAdapter(Submission)


def a_view(**fields):
    facts = JobFacts(created_at=1_500_000, now=9_000_000, expires_at=8_000_000)
    known = {
        "id": "j", "kind": "prune", "config": {}, "priority": 5, "facts": facts,
        "counts": (StageCount("anchor", "failed", 3),), "problems": (), "cost": 0,
        "cost_cap": None, "webhook": None, "cursor": "1.j",
    }  # fmt: skip
    return JobView(**known | fields)


def test_money_and_moments_leave_their_stored_units():
    body = JobBody.of(a_view(cost=1_234_567, cost_cap=2_000_000))
    assert (body.cost_usd, body.cost_cap_usd) == (1.234567, 2.0)
    assert (body.created_at, body.finished_at, body.deadline_at) == (1.5, None, 8.0)
    assert JobBody.of(a_view()).cost_cap_usd is None


def test_a_webhook_is_told_by_its_presence_alone():
    body = JobBody.of(a_view(webhook="https://hooks.example/secret"))
    assert body.webhook is True
    assert "secret" not in body.model_dump_json()
    assert JobBody.of(a_view()).webhook is False


def test_the_error_summary_is_null_where_nobody_asked():
    assert JobBody.of(a_view()).error_summary is None
    assert JobBody.of(a_view(), []).error_summary == []
    body = JobBody.of(a_view(), [ErrorSummary("lease-lost", 3, 7, "gone")])
    [row] = body.error_summary
    assert (row.code, row.items, row.first_line, row.detail) == ("lease-lost", 3, 7, "gone")


def test_an_item_shows_its_name_and_its_cost():
    view = ItemView(0, 1, "mine", "anchor", "queued", 0, 2_500, None)
    body = ItemBody.of(view)
    assert (body.custom_id, body.cost_usd, body.line) == ("mine", 0.0025, 1)


RUN = TrainRun(id="0" * 32, tenant="t", config=TrainConfig(), base="b", model="m", data="t/x.jsonl")


def test_a_run_is_shown_without_its_places_in_the_store():
    body = TrainBody.of(RUN, None).model_dump()
    assert body == {
        "base": "b",
        "model": "m",
        "version": None,
        "attempt": None,
        "progress": None,
        "result": None,
        "meta": {},
    }
    launch = Launch(launcher="kubernetes", name="secret", attempt=2)
    assert TrainBody.of(RUN.grown(launch=launch), 7).model_dump() == body | {
        "version": 7,
        "attempt": 2,
    }


def test_an_evaluation_is_counted_by_its_items():
    problem = Problem(
        benchmark="b", task_id="t", prompt="SECRET", kind="asserts", entry_point="f", test="x",
        time_limit_s=1,
    )  # fmt: skip
    data = {"b": EvalData(sha256="2" * 64, tasks=9)}
    item = EvalItem(
        id="0" * 32, tenant="t", config=EvalConfig(), model="m@1", model_prefix="SECRET",
        model_sha256="1" * 64, data=data, problems=[problem],
    )  # fmt: skip
    counts = [
        StageCount("generate", "queued", 1), StageCount("generate", "failed", 2),
        StageCount("grade", "running", 4), StageCount("grade", "succeeded", 8),
    ]  # fmt: skip
    body = EvaluationBody.of(item, counts, None)
    assert (body.questions, body.generated, body.done, body.figures) == (15, 14, 10, None)
    assert (body.model, body.model_sha256, body.benchmarks) == ("m@1", "1" * 64, data)
    assert "SECRET" not in body.model_dump_json()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"scores_from": "x"}, JobRequest),
        ({"kind": "prune", "scores_from": "x"}, JobRequest),
        ({"kind": "train", "base": "b", "model": "m", "dataset": "x"}, TrainRequest),
        ({"kind": "evaluate", "model": "m"}, EvaluateRequest),
    ],
)
def test_a_body_is_read_by_its_kind_which_may_be_missing(body, expected):
    assert type(SUBMISSION.validate_python(body)) is expected


@pytest.mark.parametrize("body", [{"kind": "bake"}, {"kind": None}, {"kind": []}, [], "x", None])
def test_a_body_of_no_known_kind_is_refused(body):
    with pytest.raises(ValidationError):
        SUBMISSION.validate_python(body)


def test_the_description_has_one_schema_a_kind():
    schema = SUBMISSION.json_schema()
    assert [one["$ref"].rpartition("/")[2] for one in schema["oneOf"]] == [
        "JobRequest",
        "TrainRequest",
        "EvaluateRequest",
    ]
    for name in ("TrainRequest", "EvaluateRequest"):
        assert "kind" in schema["$defs"][name]["required"]
    assert "kind" not in schema["$defs"]["JobRequest"].get("required", [])
