"""Jobs that use the scores of an ended job again: another target, no stage and no model.

Reads page by page, so memory does not grow with the job; the ledger's tenant rules hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from asap.config import PruneConfig
from asap.errors import Conflict, InvalidInput, NotFound
from asap.fine import rebudget
from asap.types import Record
from asap_runtime.ledger import JobLedger
from asap_runtime.problems import item_problem
from asap_runtime.values import ItemProblem, NewItem
from asap_runtime.views import JobView, Result

__all__ = ["TARGETS", "ended_job", "rebudgeted_items", "rebudgeted_values"]

TARGETS = ("max_tokens", "keep_ratio", "step_ratio")
"""A configuration has one of them."""
KNOBS = (*TARGETS, "min_steps", "refill", "protect_first", "protect_last", "count_bos", "score")
"""What selection reads, and nothing before it does."""
ENDED = ("done", "cancelled", "expired")


def ended_job(
    ledger: JobLedger, tenant: str, job_id: str, *, pointer: str = "/scores_from"
) -> JobView:
    """The job whose records are asked for, by the field `pointer` of a request.

    Raises NotFound, InvalidInput when it is no prune job, Conflict (`results-not-ready`) while it
    runs or when it never had records.
    """
    view = ledger.job(tenant, job_id)
    if view is None:
        raise NotFound(f"there is no job {job_id[:64]!r}")
    if view.kind != "prune":
        detail = f"job {job_id} is a {view.kind} job; expected a prune job"
        raise InvalidInput(detail, errors=[{"pointer": pointer, "detail": detail}])
    if view.phase not in ENDED or view.facts.finished_at is None:
        raise Conflict(
            f"job {job_id} is {view.phase}; its records can be used again once it has ended",
            code="results-not-ready",
        )
    return view


def rebudgeted_values(view: JobView, given: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the new job, not yet validated: that of `view`, changed by `given`.

    Raises InvalidInput naming each given field that is neither equal nor a knob of selection. What
    was scored in rounds holds for its own knobs only, so there the target alone may change.
    """
    knobs = TARGETS if view.config.get("mode") == "iterative" else KNOBS
    errors = [
        {
            "pointer": f"/config/{name}",
            "detail": f"differs from job {view.id}; stored scores answer for another "
            + ", ".join(knobs),
        }
        for name, value in given.items()
        if name not in knobs and name in view.config and value != view.config[name]
    ]
    if errors:
        first = errors[0]
        raise InvalidInput(f"{first['pointer']}: {first['detail']}", errors=errors)
    values: dict[str, Any] = dict(view.config)
    if any(given.get(name) is not None for name in TARGETS):
        values |= dict.fromkeys(TARGETS)
    return values | dict(given)


def rebudgeted_items(
    ledger: JobLedger, tenant: str, job_id: str, config: PruneConfig, *, start: int = 0
) -> Iterator[NewItem]:
    """The items of the new job in the order of the old one, each ended: a record, or a problem.

    The first `start` are left out: whoever was interrupted goes on behind the items it has.

    Raises NotFound when the job vanished, Conflict when its items changed while they were read.
    """
    left = sum(count.items for count in ended_job(ledger, tenant, job_id).counts) - start
    for result in ledger.results(tenant, job_id, start - 1):
        yield _item(result, job_id, config)
        left -= 1
    if left:
        ended_job(ledger, tenant, job_id)
        raise Conflict(f"job {job_id} changed while its scores were read", code="results-not-ready")


def _item(result: Result, job_id: str, config: PruneConfig) -> NewItem:
    line, custom_id = result.line, result.custom_id
    if result.payload is None:
        code = result.problem.code if result.problem else "unknown"
        problem = ItemProblem(
            "invalid-input",
            f"line {line} has no scores to use again: in job {job_id} it ended as "
            f"{result.status} ({code})",
            {"line": line, "scores_from": job_id, "code": code},
        )
        return NewItem(line, None, None, custom_id=custom_id, problem=problem)
    try:
        record = rebudget(Record.model_validate_json(result.payload), config)
    except InvalidInput as error:
        return NewItem(line, None, None, custom_id=custom_id, problem=item_problem(error))
    payload = record.model_dump_json().encode()
    return NewItem(line, None, payload, custom_id=custom_id)
