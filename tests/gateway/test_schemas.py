from __future__ import annotations

from asap_gateway.schemas import ItemBody, JobBody
from asap_runtime.phases import JobFacts, StageCount
from asap_runtime.views import ErrorSummary, ItemView, JobView


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
