"""What the routes do, without HTTP: submit, wait, read, stop. Blocking but for the wait.

A single prune is a job of one: both doors lead to `submit`, and from there everything is the same.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fastapi import Request
from pydantic import ValidationError

from asap.config import PruneConfig
from asap.errors import AsapError, InvalidInput, NotFound, Overloaded
from asap.methods import get_method
from asap.types import Record, Triple
from asap_gateway.schemas import ItemBody, ItemPage, JobBody, JobPage
from asap_gateway.settings import GatewayLimits
from asap_runtime.database import Database
from asap_runtime.idempotency import IdempotencyKeys
from asap_runtime.intake import JobIntake
from asap_runtime.layouts import Layout, to_row
from asap_runtime.ledger import JobLedger, JobView, Result
from asap_runtime.problems import item_problem
from asap_runtime.queue import BATCH, LIVE, MAX_ITEMS, Message, TaskQueue
from asap_runtime.sweep import Sweep
from asap_runtime.tables import ItemStatus
from asap_runtime.telemetry import trace_context
from asap_runtime.values import NewItem

__all__ = ["TENANT", "Gateway", "config_from_json", "get_gateway"]

TENANT = "local"
"""The one tenant of a server without keys."""
TARGETS = ("max_tokens", "keep_ratio", "step_ratio")
FIRST_WAIT_S, LONGEST_WAIT_S = 0.004, 0.1


class Gateway:
    """Jobs of one server: the rows are written first, the queue hears of them afterwards."""

    def __init__(
        self,
        database: Database,
        queue: TaskQueue,
        limits: GatewayLimits,
        *,
        defaults: Mapping[str, Any],
    ) -> None:
        self.queue, self.limits = queue, limits
        self._database, self._defaults = database, dict(defaults)
        self._intake, self._ledger = JobIntake(database), JobLedger(database)
        self._sweep = Sweep(database)
        self.keys = IdempotencyKeys(database)
        self._waiting = 0

    def config(self, given: Mapping[str, Any]) -> PruneConfig:
        """The configuration of a request; InvalidInput names each wrong field by JSON pointer."""
        defaults = self._defaults
        if any(given.get(name) is not None for name in TARGETS):  # one target, the caller's
            defaults = {k: v for k, v in defaults.items() if k not in TARGETS}
        values = {**defaults, **given}
        try:
            config = PruneConfig.model_validate(values)
        except ValidationError as error:
            errors = [
                {
                    "pointer": "/config" + "".join(f"/{part}" for part in problem["loc"]),
                    "detail": problem["msg"],
                }
                for problem in error.errors(include_url=False, include_input=False)
            ]
            first = errors[0]
            raise InvalidInput(f"{first['pointer']}: {first['detail']}", errors=errors) from None
        get_method(config.method)
        return config

    def submit(self, triples: Sequence[Triple], config: PruneConfig, *, live: bool) -> str:
        """The id of a new job whose items are in the database; the first are published."""
        for number, triple in enumerate(triples):
            try:
                triple.check()
            except InvalidInput as error:
                where = "/triple" if live else f"/triples/{number}"
                pointer = f"{where}/{error.context.get('field')}"
                errors = [{"pointer": pointer, "detail": error.detail}]
                raise InvalidInput(error.detail, code=error.problem_code, errors=errors) from None
        self._admit(len(triples), live=live)
        lines = enumerate(triples, start=1)
        return self._take_in(
            (_new_item(line, triple, config) for line, triple in lines), config, live
        )

    def submit_lines(
        self, lines: Iterable[tuple[int, Triple | AsapError]], config: PruneConfig
    ) -> str:
        """As `submit`, from the lines of a file; a bad line is a failed item."""
        self._admit(0, live=False)
        return self._take_in(
            (_new_item(number, triple, config) for number, triple in lines), config, False
        )

    async def wait(self, job_id: str, seconds: float) -> Result | None:
        """The result of a job of one, or None when it is not there in time."""
        if self._waiting >= self.limits.max_waits:
            return None
        self._waiting += 1
        pause = FIRST_WAIT_S
        try:
            async with asyncio.timeout(seconds):
                while True:
                    result = await asyncio.to_thread(self._first_result, job_id)
                    if result is not None:
                        return result
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, LONGEST_WAIT_S)
        except TimeoutError:
            return None
        finally:
            self._waiting -= 1

    def job(self, job_id: str) -> JobBody:
        """The job. Raises NotFound."""
        return JobBody.of(self._job(job_id))

    def jobs(self, cursor: str | None, limit: int) -> JobPage:
        """A page of jobs, newest first."""
        views = self._ledger.jobs(TENANT, cursor, limit)
        following = views[-1].cursor if len(views) == limit else None
        return JobPage(jobs=[JobBody.of(view) for view in views], next_cursor=following)

    def items(
        self, job_id: str, cursor: int | None, limit: int, status: ItemStatus | None
    ) -> ItemPage:
        """A page of items in input order."""
        self._job(job_id)
        views = self._ledger.items(TENANT, job_id, cursor, limit, status)
        following = views[-1].position if len(views) == limit else None
        return ItemPage(items=[ItemBody.of(view) for view in views], next_cursor=following)

    def result_rows(self, job_id: str, layout: Layout) -> Iterator[dict[str, Any]]:
        """Succeeded records in input order, as rows of the layout."""
        for result in self._ledger.results(TENANT, job_id):
            if result.payload is not None:
                yield to_row(Record.model_validate_json(result.payload), layout)

    def cancel(self, job_id: str) -> JobBody:
        """Stop the job; idempotent."""
        if not self._ledger.cancel(TENANT, job_id):
            raise _no_job(job_id)
        return self.job(job_id)

    def retry(self, job_id: str) -> JobBody:
        """Run the failed items of a finished job again."""
        self._job(job_id)
        self._ledger.retry_failed(TENANT, job_id)
        return self.job(job_id)

    def delete(self, job_id: str) -> None:
        """Stop and delete the job."""
        if not self._ledger.delete(TENANT, job_id):
            raise _no_job(job_id)

    def check_database(self) -> None:
        """Raise UpstreamUnavailable when the database does not answer."""
        self._database.time()

    def _admit(self, items: int, *, live: bool) -> None:
        if items > self.limits.max_inline_triples:
            raise InvalidInput(
                f"{items} triples in one body; at most {self.limits.max_inline_triples} are taken, "
                "upload a file instead",
                code="too-many-items",
            )
        if not live and self._ledger.open_items() >= self.limits.max_backlog:
            raise Overloaded("too many items are open; try again later", retry_after_s=30.0)

    def _take_in(self, items: Iterable[NewItem], config: PruneConfig, live: bool) -> str:
        priority = LIVE if live else BATCH
        job_id = self._intake.create_job(TENANT, "prune", config.model_dump(mode="json"), priority)
        self._intake.add_items(job_id, items)
        self._intake.mark_ingested(job_id)
        stages = get_method(config.method).stages
        if stages:
            due = self._sweep.due(stages[0], MAX_ITEMS, job_id=job_id)
            ids = tuple(str(item.id) for item in due)
            if ids and self.queue.publish(Message(stages[0], ids, priority, trace_context())):
                self._sweep.mark_published(due)
        return job_id

    def _first_result(self, job_id: str) -> Result | None:
        return next(self._ledger.results(TENANT, job_id), None)

    def _job(self, job_id: str) -> JobView:
        view = self._ledger.job(TENANT, job_id)
        if view is None:
            raise _no_job(job_id)
        return view


def _new_item(line: int, triple: Triple | AsapError, config: PruneConfig) -> NewItem:
    if isinstance(triple, AsapError):
        return NewItem(line, None, None, problem=item_problem(triple))
    stages = get_method(config.method).stages
    payload = Record(triple=triple, config=config).model_dump_json().encode()
    return NewItem(line, stages[0] if stages else None, payload)


def _no_job(job_id: str) -> NotFound:
    return NotFound(f"there is no job {job_id[:64]!r}")


def config_from_json(text: str) -> dict[str, Any]:
    """The configuration that came as a form field."""
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise InvalidInput("config: expected a JSON object", errors=[])
    return values


def get_gateway(request: Request) -> Gateway:
    """The gateway of the running application."""
    gateway: Gateway = request.app.state.gateway
    return gateway
