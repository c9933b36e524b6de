"""What evaluations came to: the report of one job, and several jobs side by side. Blocking.

A report reads every item of its jobs, so few are made at a time, and that of an ended job is kept.
Once a job has ended, the first look at it has its report made beside the requests. Its figures are
then written to the `meta` of a registered model: whoever serves that knows how many tokens it
needs.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

from pydantic import JsonValue

from asap.errors import AsapError, Conflict, InvalidInput, NotFound, Overloaded
from asap.eval_items import EvalItem, Machines, differing_data, tasks_expected
from asap.metrics import MetricsRow, Result, results_of
from asap.report import Report, build_report
from asap_gateway.evaluation_schemas import EvaluationBody, FigureBody
from asap_runtime.database import Database
from asap_runtime.ledger import JobLedger
from asap_runtime.logs import get_logger
from asap_runtime.models import ModelRegistry, parse_reference
from asap_runtime.views import JobView

__all__ = ["EvaluationReports", "figure_key"]

AT_ONCE = 2
RETRY_AFTER_S = 2.0
KEPT = 64
"""Reports of ended jobs in memory; one has some KiB."""
ENDED: Final = ("done", "cancelled", "expired")


def figure_key(benchmark: str, budget: int) -> str:
    """Where in a model's `meta` its figures on the benchmark at that budget are."""
    return f"evaluation:{benchmark}@{budget}"


class EvaluationReports:
    """Reports on the evaluations of all tenants; another tenant's job does not exist."""

    def __init__(self, database: Database) -> None:
        self._ledger, self._registry = JobLedger(database), ModelRegistry(database)
        self._slots = threading.BoundedSemaphore(AT_ONCE)
        self._kept: OrderedDict[tuple[str, int], Report] = OrderedDict()
        self._making: set[str] = set()
        self._lock = threading.Lock()
        self._log = get_logger()

    def report(self, tenant: str, job_id: str, *, partial: bool = False) -> Report:
        """The report of a job. Raises NotFound, InvalidInput when the job is of another kind,
        Conflict (`results-not-ready`) while it runs unless `partial`, and Overloaded.
        """
        view = self._view(tenant, job_id, partial)
        kept = self._look_up(view)
        if kept is not None:
            return kept
        with self._slot():
            return self._whole(tenant, view)

    def compare(self, tenant: str, job_ids: Sequence[str], *, partial: bool = False) -> Report:
        """The first job's model against each of the others'. Raises as `report` does."""
        views = [self._view(tenant, job_id, partial) for job_id in job_ids]
        with self._slot():
            return self._side_by_side(tenant, views)

    def body(self, tenant: str, view: JobView) -> EvaluationBody | None:
        """How the evaluation stands. Figures come a moment after its end: a report may take
        seconds, and nobody waits for it here.
        """
        first = self._first(tenant, view.id)
        if first is None:
            return None
        report = self._look_up(view)
        if report is None and _has_ended(view):
            self._make_later(tenant, view.id)
        return EvaluationBody.of(first, view.counts, None if report is None else report.rows)

    def _make_later(self, tenant: str, job_id: str) -> None:
        with self._lock:
            if job_id in self._making:
                return
            self._making.add(job_id)
        threading.Thread(target=self._make, args=(tenant, job_id), daemon=True).start()

    def _make(self, tenant: str, job_id: str) -> None:
        try:
            self.report(tenant, job_id)
        except AsapError as error:  # too many at once, deleted, begun again: the next look decides
            self._log.info("report.not_made", job_id=job_id, code=error.problem_code)
        except Exception:
            self._log.exception("report.crashed", job_id=job_id)
        finally:
            with self._lock:
                self._making.discard(job_id)

    def _view(self, tenant: str, job_id: str, partial: bool) -> JobView:
        view = self._ledger.job(tenant, job_id)
        if view is None:
            raise NotFound(f"there is no job {job_id[:64]!r}")
        if view.kind != "evaluate":
            raise InvalidInput(f"job {job_id} is of the kind {view.kind}; expected evaluate")
        if not (partial or _has_ended(view)):
            raise Conflict(
                f"job {job_id} is {view.phase}; its report is there once it has ended, and with "
                "partial=true before",
                code="results-not-ready",
            )
        return view

    def _look_up(self, view: JobView) -> Report | None:
        with self._lock:
            return self._kept.get((view.id, view.facts.finished_at or 0))

    def _whole(self, tenant: str, view: JobView) -> Report:
        report = self._side_by_side(tenant, [view])
        if view.facts.finished_at is not None:
            if view.phase == "done":
                self._record(tenant, view, report)
            with self._lock:
                self._kept[view.id, view.facts.finished_at] = report
                if len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
        return report

    def _side_by_side(self, tenant: str, views: Sequence[JobView]) -> Report:
        firsts = {view.id: self._first(tenant, view.id) for view in views}
        asked = {job_id: first for job_id, first in firsts.items() if first is not None}
        models = Counter(first.model for first in asked.values())
        results: dict[str, list[Result]] = {}
        provenance: dict[str, JsonValue] = {}
        for view in views:
            first = asked.get(view.id)
            name = view.id[:8] if first is None else first.model
            if models[name] > 1:
                name = f"{name} ({view.id[:8]})"
            machines = Machines()
            results[name] = list(self._results(tenant, view.id, machines))
            provenance[name] = {**_provenance(view, first), **machines.told()}
        report = build_report(
            results,
            candidate=next(iter(results)) if len(views) > 1 else None,
            expected=tasks_expected(asked.values()),
            provenance=provenance,
        )
        doubts = tuple(
            f"{name}: the jobs were asked different data; their tasks may differ"
            for name in differing_data(asked.values())
        )
        return report.model_copy(update={"incomplete": doubts + report.incomplete})

    def _results(self, tenant: str, job_id: str, machines: Machines) -> Iterator[Result]:
        for result in self._ledger.results(tenant, job_id):
            if result.payload is not None:
                item = EvalItem.model_validate_json(result.payload)
                machines.add(item)
                yield from results_of(item)

    def _first(self, tenant: str, job_id: str) -> EvalItem | None:
        payload = self._ledger.first_payload(tenant, job_id)
        return None if payload is None else EvalItem.model_validate_json(payload)

    def _record(self, tenant: str, view: JobView, report: Report) -> None:
        """Write the figures of wholly scored benchmarks to the model, where they are of as many
        tasks as those that are there, and newer.
        """
        first = self._first(tenant, view.id)
        reference = None if first is None or first.model_sha256 is None else first.model
        named = None if reference is None else parse_reference(reference)
        if first is None or named is None:
            return
        with suppress(NotFound):  # the model was removed
            meta = self._registry.get(tenant, *named).meta
            for row in report.rows:
                if row.extraction != first.config.extractions[0]:
                    continue
                if row.tasks < first.data[row.benchmark].tasks:
                    continue
                key, figure = figure_key(row.benchmark, row.budget), _figure(view, row)
                if _weight(figure) > _weight(meta.get(key)):
                    self._registry.annotate(tenant, *named, key, figure)

    @contextmanager
    def _slot(self) -> Iterator[None]:
        if not self._slots.acquire(blocking=False):
            raise Overloaded("other reports are being made; try again", retry_after_s=RETRY_AFTER_S)
        try:
            yield
        finally:
            self._slots.release()


def _has_ended(view: JobView) -> bool:
    return view.phase in ENDED and view.facts.finished_at is not None


def _provenance(view: JobView, first: EvalItem | None) -> dict[str, JsonValue]:
    told: dict[str, JsonValue] = {
        "job": view.id,
        "phase": view.phase,
        "config": dict(view.config),
    }
    if first is not None:
        told["model_sha256"] = first.model_sha256
        told["data"] = {name: data.model_dump() for name, data in first.data.items()}
    return told


def _figure(view: JobView, row: MetricsRow) -> dict[str, JsonValue]:
    return {
        **FigureBody.of(row).model_dump(mode="json"),
        "job": view.id,
        "finished_at": view.facts.finished_at,
    }


def _weight(figure: Any) -> tuple[int, int]:
    """More tasks count more, then what is newer."""
    return (figure["tasks"], figure["finished_at"]) if isinstance(figure, Mapping) else (0, 0)
