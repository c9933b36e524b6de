"""The audit trail, on every database."""

from __future__ import annotations

import pytest
from sqlalchemy import func, select, update

from asap_runtime.audit import AuditTrail
from asap_runtime.database import SECOND
from asap_runtime.tables import audit

DAY_S = 24 * 3600


@pytest.fixture
def trail(database):
    return AuditTrail(database)


def act(trail, number, tenant="a"):
    trail.record(
        tenant=tenant, actor="key", action="POST /jobs", object=str(number), result="202",
        request_id=f"r{number}",
    )  # fmt: skip


def objects(entries):
    return [entry.object for entry in entries]


def test_an_act_is_kept_as_it_was(trail, database):
    before = database.time()
    trail.record(tenant="a", actor="k", action="DELETE /jobs/{job_id}", object="j", result="204")
    act(trail, 7)
    newest, oldest = trail.entries("a")
    assert (oldest.actor, oldest.action, oldest.object, oldest.result, oldest.request_id) == (
        "k", "DELETE /jobs/{job_id}", "j", "204", None,
    )  # fmt: skip
    assert newest.request_id == "r7"
    assert before <= oldest.at <= newest.at <= database.time()


def test_entries_are_read_newest_first_by_cursor_within_a_tenant(trail):
    for number in range(5):
        act(trail, number)
        act(trail, number + 100, tenant="b")
    first = trail.entries("a", limit=2)
    second = trail.entries("a", first[-1].id, limit=2)
    third = trail.entries("a", second[-1].id, limit=2)
    assert [objects(page) for page in (first, second, third)] == [["4", "3"], ["2", "1"], ["0"]]
    assert trail.entries("c") == []


def test_what_came_from_outside_is_made_to_fit(trail):
    trail.record(
        tenant="a", actor="k", action="POST /" + "x" * 100, object="\x00\x1b[31m" + "é" * 200,
        result="202", request_id="i\nd" * 50,
    )  # fmt: skip
    [entry] = trail.entries("a")
    assert (len(entry.action), len(entry.object), len(entry.request_id)) == (64, 128, 64)
    assert entry.object.startswith("??[31mé")
    assert entry.request_id.startswith("i?di?d")


def test_old_acts_are_forgotten_in_portions_and_new_ones_stay(trail, database):
    for number in range(3):
        act(trail, number)
    with database.write() as connection:
        connection.execute(update(audit).values(at=audit.c.at - 399 * DAY_S * SECOND))
    assert trail.forget_old(10) == 0
    with database.write() as connection:
        connection.execute(update(audit).values(at=audit.c.at - 2 * DAY_S * SECOND))
    act(trail, 3)
    assert [trail.forget_old(2) for _ in range(3)] == [2, 1, 0]
    assert objects(trail.entries("a")) == ["3"]
    with database.read() as connection:
        assert connection.execute(select(func.count()).select_from(audit)).scalar_one() == 1
