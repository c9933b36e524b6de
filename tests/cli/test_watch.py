from __future__ import annotations

import io

import pytest
from rich.console import Console

from asap_cli.answers import ErrorCount, Item, ItemProblem, Job, StageCount
from asap_cli.watch import (
    Failures,
    JobProgress,
    print_end,
    print_failures,
    route_of,
    stage_progress,
)

ROUTE = ("anchor", "surprisal")


def a_job(*counts, phase="running", **fields):
    stages = tuple(StageCount(stage=s, status=status, items=n) for s, status, n in counts)
    total = sum(count.items for count in stages)
    facts = {"id": "j", "created_at": 10.0, "finished_at": None, **fields}
    return Job(phase=phase, total=total, counts=stages, **facts)


def said(show, *, terminal=False):
    stream = io.StringIO()
    show(Console(file=stream, force_terminal=terminal, width=120))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("counts", "progress"),
    [
        ([("anchor", "queued", 4)], [(0, 4), (0, 4)]),
        ([("anchor", "running", 1), ("surprisal", "queued", 3)], [(3, 4), (0, 4)]),
        ([("anchor", "failed", 1), ("surprisal", "succeeded", 3)], [(4, 4), (3, 3)]),
        ([(None, "failed", 2), ("surprisal", "failed", 3)], [(3, 3), (3, 3)]),
        ([("anchor", "cancelled", 1), ("anchor", "queued", 1)], [(1, 2), (0, 1)]),
    ],
)
def test_progress_by_stage(counts, progress):
    rows = stage_progress(a_job(*counts), ROUTE)
    assert [row.stage for row in rows] == list(ROUTE)
    assert [(row.done, row.total) for row in rows] == progress


def test_the_route_is_the_methods_or_what_is_seen():
    assert route_of(a_job(config={"method": "asap"})) == ROUTE
    assert route_of(a_job(config={"method": "original"})) == ()
    seen = a_job((None, "failed", 1), ("new", "queued", 1), config={"method": "from tomorrow"})
    assert route_of(seen) == ("new",)


def test_plain_lines_come_at_changes_of_phase_and_from_time_to_time():
    states = [
        a_job(("anchor", "queued", 4), phase="queued"),
        a_job(("anchor", "running", 4)),
        a_job(("anchor", "running", 3), ("surprisal", "succeeded", 1)),
        a_job(("surprisal", "succeeded", 4), phase="done"),
    ]

    def show(console, **options):
        with JobProgress(console, ROUTE, **options) as progress:
            for state in states:
                progress.show(state)

    lines = said(lambda console: show(console, line_every_s=3600)).splitlines()
    assert lines[0] == "queued, anchor 0/4, surprisal 0/4"
    assert lines[-1] == "done, anchor 4/4, surprisal 4/4"
    assert len(lines) == 3
    lines = said(lambda console: show(console, line_every_s=0)).splitlines()
    assert len(lines) == 4
    assert "items/s" in lines[2]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_job_without_stages_shows_none(terminal):
    def show(console):
        with JobProgress(console, ROUTE) as progress:
            progress.show(a_job((None, "succeeded", 4), phase="done"))

    text = said(show, terminal=terminal)
    assert "anchor" not in text
    assert (text == "done\n") is not terminal


def test_bars_on_a_terminal():
    def show(console):
        with JobProgress(console, ROUTE) as progress:
            progress.show(a_job(("anchor", "queued", 4)))
            progress.show(a_job(("anchor", "failed", 1), ("surprisal", "succeeded", 3)))

    text = said(show, terminal=True)
    for word in ("anchor", "surprisal", "4/4", "3/3", "ETA"):
        assert word in text


def test_the_end_and_its_failures():
    codes = ["a"] * 3 + ["b"] * 2 + ["c", "d", "e", "f"]
    items = [Item(line=1, status="succeeded", problem=None)] + [
        Item(line=line, status="failed", problem=ItemProblem(code=code, detail=f"why\n{code}"))
        for line, code in enumerate(codes, start=2)
    ]
    job = a_job(
        ("anchor", "failed", 10),
        phase="done",
        finished_at=12.5,
        problems=(ItemProblem(code="x", detail="y"),),
    )
    text = said(lambda console: print_end(console, job))
    assert text == "job j is done in 2.5 s: 10 failed\nx: y\n"
    text = said(lambda console: print_failures(console, job, Failures.of(job, items)))
    assert text.splitlines()[:2] == [
        "3 × a, first at line 2: why a",
        "2 × b, first at line 5: why b",
    ]
    assert "and 1 other problem codes" in text
    assert "1 more failures after line 100,000" in text


def test_items_are_read_no_further_than_needed():
    def items():
        yield Item(line=1, status="failed", problem=None)
        raise AssertionError("read on")

    found = Failures.of(a_job(("anchor", "failed", 1)), items())
    text = said(lambda console: print_failures(console, a_job(("anchor", "failed", 1)), found))
    assert text == "1 × unknown, line 1: no reason given\n"


def test_what_the_server_says_of_failures_is_not_read_again():
    def items():
        raise AssertionError("read")
        yield

    row = ErrorCount(code="cost-cap-reached", items=7, first_line=3, detail="the cap\nwas reached")
    job = a_job(("anchor", "failed", 9), phase="done", error_summary=(row,))
    text = said(lambda console: print_failures(console, job, Failures.of(job, items())))
    assert text.splitlines() == [
        "7 × cost-cap-reached, first at line 3: the cap was reached",
        "2 more failures with other codes",
    ]


@pytest.mark.parametrize(
    ("money", "end"),
    [
        ({}, ""),
        ({"cost_usd": 0.0123456}, ", cost $0.0123"),
        ({"cost_usd": 1.5, "cost_cap_usd": 2.0}, ", cost $1.5000 of at most $2.00"),
        ({"cost_cap_usd": 2.0}, ", cost $0.0000 of at most $2.00"),
    ],
)
def test_the_end_tells_what_was_paid(money, end):
    job = a_job(("anchor", "succeeded", 1), phase="done", **money)
    text = said(lambda console: print_end(console, job))
    assert text == f"job j is done: 1 succeeded{end}\n"
