"""How work comes in: one triple or many, the rows first, the queue hears of them afterwards.

A single prune is a job of one: both doors lead to `submit`, and from there everything is the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from asap.config import PruneConfig
from asap.errors import AsapError, InvalidInput, Overloaded
from asap.methods import get_method
from asap.types import Record, Triple
from asap_gateway.schemas import JobOptions
from asap_gateway.settings import GatewayLimits
from asap_runtime.database import Database
from asap_runtime.intake import JobIntake
from asap_runtime.ledger import JobLedger, Result
from asap_runtime.problems import item_problem
from asap_runtime.queue import BATCH, LIVE, MAX_ITEMS, Message, TaskQueue
from asap_runtime.sweep import Sweep
from asap_runtime.telemetry import trace_context
from asap_runtime.values import NewItem

__all__ = ["Submissions"]

TARGETS = ("max_tokens", "keep_ratio", "step_ratio")
FIRST_WAIT_S, LONGEST_WAIT_S = 0.004, 0.1


class Submissions:
    """Takes jobs in. Blocking but for `wait`."""

    def __init__(
        self,
        database: Database,
        queue: TaskQueue,
        limits: GatewayLimits,
        *,
        defaults: Mapping[str, Any],
    ) -> None:
        self._queue, self._limits, self._defaults = queue, limits, dict(defaults)
        self._intake, self._ledger = JobIntake(database), JobLedger(database)
        self._sweep = Sweep(database)
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

    def prune(self, tenant: str, triple: Triple, given: Mapping[str, Any], key: str | None) -> str:
        """The id of a live job of one."""
        config = self.config(given)
        _check(triple, "/triple")
        return self._take_in(tenant, [_new_item(1, triple, config)], config, LIVE, key=key)

    def submit(
        self, tenant: str, triples: Sequence[Triple], options: JobOptions, key: str | None
    ) -> str:
        """The id of a new job of triples given in the body."""
        config = self.config(options.config)
        for number, triple in enumerate(triples):
            _check(triple, f"/triples/{number}")
        self.admit(tenant, len(triples))
        items = (_new_item(line, triple, config) for line, triple in enumerate(triples, start=1))
        return self._take_in(tenant, items, config, BATCH, key=key)

    def submit_lines(
        self,
        tenant: str,
        lines: Iterable[tuple[int, Triple | AsapError]],
        options: JobOptions,
    ) -> str:
        """As `submit`, from the lines of a file; a bad line is a failed item."""
        config = self.config(options.config)
        self.admit(tenant, 0)
        items = (_new_item(number, triple, config) for number, triple in lines)
        return self._take_in(tenant, items, config, BATCH, key=None)

    def admit(self, tenant: str, items: int) -> None:
        """Refuse what cannot be taken now: too many triples in a body, too many open items."""
        if items > self._limits.max_inline_triples:
            raise InvalidInput(
                f"{items} triples in one body; at most {self._limits.max_inline_triples} are "
                "taken, upload a file instead",
                code="too-many-items",
            )
        if self._ledger.open_items() >= self._limits.max_backlog:
            raise Overloaded("too many items are open; try again later", retry_after_s=30.0)

    async def wait(self, tenant: str, job_id: str, seconds: float) -> Result | None:
        """The result of a job of one, or None when it is not there in time."""
        if self._waiting >= self._limits.max_waits:
            return None
        self._waiting += 1
        pause = FIRST_WAIT_S
        try:
            async with asyncio.timeout(seconds):
                while True:
                    result = await asyncio.to_thread(self._first_result, tenant, job_id)
                    if result is not None:
                        return result
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, LONGEST_WAIT_S)
        except TimeoutError:
            return None
        finally:
            self._waiting -= 1

    def _take_in(
        self,
        tenant: str,
        items: Iterable[NewItem],
        config: PruneConfig,
        priority: int,
        *,
        key: str | None,
    ) -> str:
        job_id = self._intake.create_job(
            tenant, "prune", config.model_dump(mode="json"), priority, idempotency_key=key
        )
        self._intake.add_items(job_id, items)
        self._intake.mark_ingested(job_id)
        stages = get_method(config.method).stages
        if stages:
            due = self._sweep.due(stages[0], MAX_ITEMS, job_id=job_id)
            ids = tuple(str(item.id) for item in due)
            if ids and self._queue.publish(Message(stages[0], ids, priority, trace_context())):
                self._sweep.mark_published(due)
        return job_id

    def _first_result(self, tenant: str, job_id: str) -> Result | None:
        return next(self._ledger.results(tenant, job_id), None)


def _check(triple: Triple, where: str) -> None:
    try:
        triple.check()
    except InvalidInput as error:
        errors = [{"pointer": f"{where}/{error.context.get('field')}", "detail": error.detail}]
        raise InvalidInput(error.detail, code=error.problem_code, errors=errors) from None


def _new_item(line: int, triple: Triple | AsapError, config: PruneConfig) -> NewItem:
    if isinstance(triple, AsapError):
        return NewItem(line, None, None, problem=item_problem(triple))
    stages = get_method(config.method).stages
    payload = Record(triple=triple, config=config).model_dump_json().encode()
    return NewItem(line, stages[0] if stages else None, payload)
