from __future__ import annotations

import io

from rich.console import Console

from asap.metrics import Result
from asap.report import build_report
from asap_cli.eval_views import comparison_table, report_table


def result(task, passed, *, budget=64, tokens=10, benchmark="mine"):
    return Result(
        benchmark=benchmark, task_id=task, budget=budget, number=0, extraction="strict",
        verdict="passed" if passed else "wrong", tokens=tokens, truncated=not passed, loop=False,
        flags=(), started_at=0.0, seconds=1.0,
    )  # fmt: skip


def cells(table):
    stream = io.StringIO()
    Console(file=stream, width=200).print(table)
    return [line.split() for line in stream.getvalue().splitlines()]


MINE = [result("a", True), result("b", False), result("c", True, budget=128)]
THEIRS = [result("a", False, tokens=20), result("b", False, tokens=20)]


def test_a_row_for_each_budget_and_what_is_missing_below():
    report = build_report({"new\x1b[2J": MINE}, expected={"mine": 3})
    head, first, second, *below = cells(report_table(report))
    assert head[:2] == ["model", "benchmark"]
    assert first[1:7] == ["mine", "64", "strict", "2", "1", "50.00"]
    assert second[1:7] == ["mine", "128", "strict", "1", "1", "100.00"]
    assert first[-4:] == ["10", "50", "%", "0.33"]  # the second is shared by all three
    text = " ".join(word for line in below for word in line)
    assert "mine at 64 tokens, strict: 2 of 3 tasks are scored" in text
    assert "\x1b" not in str(cells(report_table(report)))


def test_a_comparison_is_of_the_candidate_less_the_baseline():
    report = build_report({"new": MINE, "old": THEIRS}, candidate="new", expected={"mine": 2})
    [head, row, *below] = cells(comparison_table(report))
    assert head[:2] == ["baseline", "benchmark"]
    assert row[:7] == ["old", "mine", "64", "strict", "2", "1", "0"]
    assert "+50.00" in row
    assert "-10" in row
    assert row[row.index("%") - 1] == "50.0"
    assert below[0][:3] == ["new", "against", "the"]
