"""From the items of one run or of several to their report, its page, and what it was made with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import JsonValue

from asap.errors import InvalidInput
from asap.eval_items import EvalItem, Machines, differing_data, tasks_expected
from asap.metrics import results_of
from asap.report import Report, build_report
from asap_evaluator.report_html import Completion, render_html

__all__ = ["compare_runs", "page_of", "report_of"]

Items = Sequence[EvalItem]


def report_of(items: Items, name: str, *, facts: Mapping[str, JsonValue] | None = None) -> Report:
    """The report of one run. `facts`: of the machine, beside what the items say."""
    return build_report(
        {name: [result for item in items for result in results_of(item)]},
        expected=tasks_expected(items),
        provenance={name: {**_made_with(items), **(facts or {})}},
    )


def compare_runs(runs: Mapping[str, Items], candidate: str) -> Report:
    """Runs side by side by name, the candidate against each of the others."""
    everything = [item for items in runs.values() for item in items]
    report = build_report(
        {
            name: [result for item in items for result in results_of(item)]
            for name, items in runs.items()
        },
        candidate=candidate,
        expected=tasks_expected(everything),
        provenance={
            name: {**_made_with(items), **Machines(items).told()} for name, items in runs.items()
        },
    )
    doubts = tuple(
        f"{name}: the runs were asked different data; their tasks may differ"
        for name in differing_data(items[0] for items in runs.values() if items)
    )
    return report.model_copy(update={"incomplete": doubts + report.incomplete})


def page_of(report: Report, runs: Mapping[str, Items]) -> str:
    """The report as HTML, with the completions of tasks that only one of two models solves."""
    wanted = {(d.benchmark, d.task_id, d.budget, d.number) for d in report.differences}
    texts: dict[Completion, str] = {}
    for name, items in runs.items():
        for item in items:
            for problem in item.problems:
                for sample in item.samples:
                    key = (problem.benchmark, problem.task_id, sample.budget, sample.number)
                    if key in wanted:
                        texts[name, *key] = sample.text
    return render_html(report, texts)


def _made_with(items: Items) -> dict[str, JsonValue]:
    """Configuration, model and data of a run, the same in all of its items."""
    if not items:
        return {}
    first = items[0]
    if any(item.id != first.id for item in items):
        raise InvalidInput("the items are of different evaluations")
    return {
        "run": first.id,
        "model": first.model,
        "model_sha256": first.model_sha256,
        "config": first.config.model_dump(mode="json"),
        "data": {name: data.model_dump() for name, data in first.data.items()},
    }
