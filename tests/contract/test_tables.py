"""Each question of the hot path is answered by its index, on every database."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
from sqlalchemy import event, text

from asap_runtime.values import Outcome
from job_store import TENANT


@contextmanager
def plans(database, *, small=True):
    """The plans of all statements on items that run in the block."""
    statements, found = [], []

    def note(connection, cursor, statement, parameters, context, executemany):
        if not executemany and "items" in statement:
            statements.append((statement, parameters))

    event.listen(database.engine, "before_cursor_execute", note)
    yield found
    event.remove(database.engine, "before_cursor_execute", note)
    with database.write() as connection:
        if not database.is_sqlite and small:
            # A small table is read whole; what matters is that the index can serve at all.
            connection.execute(text("SET LOCAL enable_seqscan = off"))
            connection.execute(text("SET LOCAL enable_bitmapscan = off"))
        word = "EXPLAIN QUERY PLAN " if database.is_sqlite else "EXPLAIN "
        for statement, parameters in statements:
            rows = connection.exec_driver_sql(word + statement, parameters).all()
            found.append("\n".join(str(row) for row in rows))


@pytest.mark.parametrize(
    ("index", "ask"),
    [
        ("ix_items_ready", lambda p, job: p.store.claim_next("one", "worker", 2)),
        ("ix_items_ready", lambda p, job: p.sweep.due("one", 2)),
        ("ix_items_published", lambda p, job: p.sweep.load("one")),
        ("ix_items_leases", lambda p, job: p.sweep.expire_leases(2)),
        ("ix_items_counts", lambda p, job: p.sweep.finish_jobs(2)),
        ("ix_items_counts", lambda p, job: p.ledger.job(TENANT, job)),
        ("ix_items_position", lambda p, job: p.ledger.items(TENANT, job)),
        ("ix_items_position", lambda p, job: list(p.ledger.results(TENANT, job))),
    ],
    ids=["claim_next", "due", "load", "expire", "finish", "counts", "items", "results"],
)
def test_an_index_answers(platform, index, ask):
    job_id = platform.job(300)
    for _ in range(3):  # most items of a big job are done: the planner sees that
        claims = platform.claim()
        platform.store.finish([Outcome.done(claim, b"{}", None) for claim in claims])
    with platform.database.write() as connection:
        connection.execute(text("ANALYZE"))
    with plans(platform.database) as found:
        ask(platform, job_id)
    assert index in found[0], found
    if index == "ix_items_ready":
        assert "Sort" not in found[0]
        assert "TEMP B-TREE" not in found[0]


BY_ID = {
    "claim": lambda p, ids: p.store.claim(ids[:2], "one", "worker"),
    "heartbeat": lambda p, ids: p.store.heartbeat(p.claim(2)),
    "finish": lambda p, ids: p.store.finish([Outcome.release(c) for c in p.claim(2)]),
    "mark": lambda p, ids: p.sweep.mark_published(p.sweep.due("one", 1)),
}


@pytest.mark.parametrize("ask", BY_ID.values(), ids=BY_ID)
def test_a_quiet_hour_does_not_spoil_the_plans(platform, ask):
    """Statistics of a time when nothing was queued: a partial index looks empty and cheap."""
    for _ in range(3):
        platform.job(64)
        platform.store.finish([Outcome.done(claim, b"{}", None) for claim in platform.claim()])
    platform.sweep.finish_jobs(10)
    with platform.database.write() as connection:
        connection.execute(text("ANALYZE"))
    platform.job(3000)
    ids = platform.ids()
    with plans(platform.database, small=False) as found:
        ask(platform, ids)
    by_id = "INTEGER PRIMARY KEY" if platform.database.is_sqlite else "pk_items"
    named = [plan for plan in found if by_id in plan]
    assert named
    in_order = [plan for plan in found if "ix_items_ready" in plan]
    assert not [plan for plan in named if "ix_items_ready" in plan or "ix_items_leases" in plan]
    assert not [plan for plan in in_order if "Sort" in plan or "TEMP B-TREE" in plan]
    assert len(named) + len(in_order) == len(found), found


def test_the_passes_of_the_sweeper_do_not_walk_what_waits(platform):
    """A pass a second over a million queued items must not look at each of them."""
    platform.sweep.mark_published(platform.sweep.due("one", 10))
    platform.job(3000)
    with plans(platform.database, small=False) as found:
        platform.sweep.load("one")
        platform.sweep.end_items(10)
        platform.sweep.expire_leases(10)
        platform.sweep.finish_jobs(10)
    assert not [plan for plan in found if "ix_items_ready" in plan], found
    assert not [plan for plan in found if "SCAN items" in plan or "Seq Scan on items" in plan], (
        found
    )


def test_lists_never_read_a_payload(platform):
    job_id = platform.job(3)
    seen = []
    event.listen(
        platform.database.engine,
        "before_cursor_execute",
        lambda connection, cursor, statement, *_: seen.append(statement),
    )
    platform.ledger.items(TENANT, job_id)
    platform.ledger.jobs(TENANT)
    platform.sweep.due("one", 10)
    assert seen
    assert not [statement for statement in seen if "payload" in statement]
