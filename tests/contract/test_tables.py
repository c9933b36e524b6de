"""Each question of the hot path is answered by its index, on every database."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
from sqlalchemy import event, text

from asap_runtime.values import Outcome
from job_store import TENANT


@contextmanager
def plans(database):
    """The plans of all statements that run in the block."""
    statements, found = [], []

    def note(connection, cursor, statement, parameters, context, executemany):
        if not executemany and "items" in statement:
            statements.append((statement, parameters))

    event.listen(database.engine, "before_cursor_execute", note)
    yield found
    event.remove(database.engine, "before_cursor_execute", note)
    with database.write() as connection:
        if not database.is_sqlite:
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
        ("ix_items_leases", lambda p, job: p.sweep.expire_leases(2)),
        ("ix_items_counts", lambda p, job: p.sweep.finish_jobs(2)),
        ("ix_items_counts", lambda p, job: p.ledger.job(TENANT, job)),
        ("ix_items_position", lambda p, job: p.ledger.items(TENANT, job)),
        ("ix_items_position", lambda p, job: list(p.ledger.results(TENANT, job))),
    ],
    ids=["claim_next", "due", "expire", "finish", "counts", "items", "results"],
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
