"""A stage, and the only path by which items reach it: claim, process, save, publish the next.

A stage knows no SQL and no broker. The runner promises at-least-once execution and exactly-once
effect: every write carries the fence of its claim, and a write that comes too late changes nothing.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from pydantic import ValidationError
from structlog.contextvars import bound_contextvars

from asap.errors import AsapError, CapacityError
from asap.payloads import Payload, read_payload, route_of
from asap_runtime.finisher import Finisher
from asap_runtime.logs import get_logger
from asap_runtime.precedence import Precedence
from asap_runtime.problems import item_problem
from asap_runtime.queue import LIVE, Message, TaskQueue
from asap_runtime.spending import Spending, charged_to
from asap_runtime.store import MAX_BATCH, JobStore
from asap_runtime.sweep import Sweep
from asap_runtime.telemetry import (
    ITEMS,
    QUEUE_WAIT_SECONDS,
    STAGE_SECONDS,
    STALE_WRITES,
    annotate,
    span,
    trace_carrier,
)
from asap_runtime.values import Claimed, ItemProblem, Outcome

__all__ = ["Done", "Launching", "RunnerLimits", "Stage", "StageRunner", "Wait", "next_stage"]

P = TypeVar("P", bound=Payload)


@dataclass(frozen=True, slots=True)
class Done(Generic[P]):
    """The stage is through with the payload."""

    payload: P


@dataclass(frozen=True, slots=True)
class Wait(Generic[P]):
    """Not finished: ask again after so many seconds. Not an attempt."""

    payload: P
    seconds: float


class Stage(Protocol[P]):
    """One station of the route, for one kind of payload. `process` is glue: it calls the core with
    an adapter.
    """

    @property
    def name(self) -> str:
        """The name in routes, queues and metrics."""

    @property
    def concurrency(self) -> int:
        """Items at the same time."""

    async def start(self) -> None:
        """Load what the stage needs; called once, before the first item."""

    async def process(self, payload: P, /) -> Done[P] | Wait[P]:
        """The grown payload. Raises AsapError; only retryable ones are tried again."""

    async def stop(self) -> None:
        """Let go of what `start` took."""


@runtime_checkable
class Launching(Protocol):
    """A stage whose work goes on while its item waits: in a process or a Kubernetes Job.

    Nobody runs such an item when its job is cancelled, deleted or late, so nobody could be told.
    The host asks instead, every few seconds: what is launched, whose job it is, and stops the rest
    (see `asap_runtime.reconciling`). A job that is gone is found as well, and so is what a worker
    before this one has left.
    """

    async def launched(self) -> Sequence[str]:
        """The ids of the jobs that something of this worker still works on, whoever launched it.
        A training run has the id of its job.
        """

    async def cancel(self, job_id: str, /) -> None:
        """Stop that work and return at once, or soon; without effect when it has ended."""


@dataclass(frozen=True, slots=True)
class RunnerLimits:
    """How patient the runner is."""

    lease_s: float = 60.0
    heartbeat_s: float = 4.0
    """Also how soon the work on a cancelled item ends."""
    timeout_s: float = 1800.0
    """Of one call of `process`; an item that waits may live for days."""
    max_attempts: int = 5
    backoff_base_s: float = 2.0
    backoff_cap_s: float = 300.0


def next_stage(payload: Payload, stage: str) -> str | None:
    """The stage behind `stage` on the payload's route; None at its end."""
    route = route_of(payload)
    at = route.index(stage) + 1 if stage in route else len(route)
    return route[at] if at < len(route) else None


class StageRunner:
    """Runs the items of one message through one stage; the same in every deployment."""

    def __init__(
        self,
        stage: Stage[Any],
        store: JobStore,
        sweep: Sweep,
        queue: TaskQueue,
        *,
        owner: str,
        limits: RunnerLimits | None = None,
        precedence: Precedence | None = None,
    ) -> None:
        self._precedence = precedence or Precedence()
        self._stage, self._store, self._queue, self._owner = stage, store, queue, owner
        self._finisher = Finisher(store, sweep, queue)
        self._limits = limits or RunnerLimits()
        # A fifth of the slots is for live items alone: they never wait behind a long job.
        reserved = max(1, stage.concurrency // 5)
        self._live = asyncio.Semaphore(reserved)
        self._batch = asyncio.Semaphore(max(1, stage.concurrency - reserved))
        self._claimed = 0
        self._freed = asyncio.Event()
        self._log = get_logger()

    async def run(self, message: Message) -> None:
        """Claim what of the message is still due, and run it; the rest needs nothing."""
        # Items that only wait here are items that no other worker can take.
        while message.priority != LIVE and self._claimed >= self._stage.concurrency:
            self._freed.clear()
            await self._freed.wait()
        named = len(message.item_ids)
        self._claimed += named
        claims: Sequence[Claimed] = ()
        try:
            claims = await self._claim(message)
        finally:
            self._free(named - len(claims))
        await self._run_claims(claims, message.trace)

    async def _claim(self, message: Message) -> Sequence[Claimed]:
        ids = [int(item_id) for item_id in message.item_ids if item_id.isdecimal()]
        if message.priority != LIVE:
            await self._precedence.give_way()
        claiming = asyncio.ensure_future(
            asyncio.to_thread(
                self._store.claim, ids, self._stage.name, self._owner, self._limits.lease_s
            )
        )
        try:
            return await asyncio.shield(claiming)
        except asyncio.CancelledError:
            # The thread claims nevertheless; without this its items would wait for their leases.
            await asyncio.to_thread(self._store.release, await claiming)
            raise

    def _free(self, items: int) -> None:
        """So many items have ended, or were never this worker's: the next message may be taken."""
        self._claimed -= items
        self._freed.set()

    async def poll(self, period_s: float) -> None:
        """Claim without messages while the broker is away, until cancelled."""
        while True:
            await asyncio.sleep(period_s)
            if self._queue.healthy():
                continue
            limit = min(MAX_BATCH, self._stage.concurrency)
            try:
                claims = await asyncio.to_thread(
                    self._store.claim_next,
                    self._stage.name,
                    self._owner,
                    limit,
                    self._limits.lease_s,
                )
            except AsapError as error:  # the database is away as well
                self._log.warning("poll.failed", code=error.problem_code)
                continue
            self._claimed += len(claims)
            await self._run_claims(claims, {})

    async def _run_claims(self, claims: Sequence[Claimed], trace: dict[str, str]) -> None:
        if not claims:
            return
        spent = {claim.id: Spending() for claim in claims}
        running = {
            claim.id: asyncio.create_task(self._run_one(claim, trace, spent[claim.id]))
            for claim in claims
        }
        for task in running.values():
            task.add_done_callback(lambda _: self._free(1))
        alive = asyncio.create_task(self._keep_alive(claims, running))
        try:
            await asyncio.wait(running.values())
        except asyncio.CancelledError:
            for task in running.values():
                task.cancel()
            await asyncio.gather(*running.values(), return_exceptions=True)
            await self._give_back(claims, spent)
            raise
        finally:
            alive.cancel()
            with suppress(asyncio.CancelledError):
                await alive
        # Work that the heartbeat stopped: the claims are lost, what they cost is booked.
        if lost := [claim for claim in claims if running[claim.id].cancelled()]:
            try:
                await self._give_back(lost, spent)
            except AsapError as error:  # the database is away
                self._log.warning("item.not_saved", code=error.problem_code)

    async def _give_back(self, claims: Sequence[Claimed], spent: Mapping[int, Spending]) -> None:
        """Release what of the claims is still held, and book what the work on them cost."""
        outcomes = [
            replace(Outcome.release(claim), cost=spent[claim.id].take()) for claim in claims
        ]
        await asyncio.shield(asyncio.to_thread(self._store.finish, outcomes))

    async def _keep_alive(
        self, claims: Sequence[Claimed], running: Mapping[int, asyncio.Task[None]]
    ) -> None:
        """Extend the leases; stop the work on items that were cancelled or given to others."""
        while True:
            await asyncio.sleep(self._limits.heartbeat_s)
            open_claims = [claim for claim in claims if not running[claim.id].done()]
            try:
                held = await asyncio.to_thread(
                    self._store.heartbeat, open_claims, self._limits.lease_s
                )
            except AsapError:  # the database is away; the leases have time for several beats
                self._log.warning("lease.not_extended", items=len(open_claims))
                continue
            for claim in open_claims:
                if claim.id not in held:
                    running[claim.id].cancel()

    async def _run_one(self, claim: Claimed, trace: dict[str, str], spent: Spending) -> None:
        started = asyncio.get_running_loop().time()
        QUEUE_WAIT_SECONDS.labels(self._stage.name).observe(claim.waited_s)
        name, job_id, attempt = self._stage.name, claim.job_id, claim.attempt
        # The message's context is that of one of its items; the row has the item's own.
        carrier = trace_carrier(claim.trace) or trace
        with (
            span(f"stage {name}", carrier, item_id=claim.id, attempt=attempt, job_id=job_id),
            bound_contextvars(job_id=job_id, item_id=claim.id, stage=name, attempt=attempt),
        ):
            annotate(queue_s=claim.waited_s)
            outcome = await self._in_turn(claim, spent)
            outcome = replace(outcome, cost=spent.take())
            try:
                saved = await self._finisher.save(outcome)
            except AsapError as error:  # the database is away: the lease ends, another run follows
                self._log.warning("item.not_saved", code=error.problem_code)
                return
            seconds = asyncio.get_running_loop().time() - started
            STAGE_SECONDS.labels(self._stage.name).observe(seconds)
            ITEMS.labels(self._stage.name, outcome.kind).inc()
            annotate(outcome=outcome.kind, saved=saved)
            if not saved:
                STALE_WRITES.labels(self._stage.name).inc()
            self._log.info(
                "item.left_stage", outcome=outcome.kind, saved=saved, seconds=round(seconds, 3)
            )

    async def _in_turn(self, claim: Claimed, spent: Spending) -> Outcome:
        """Process the item in a slot of its kind; a live one has the processor first, too."""
        if claim.priority == LIVE:
            with self._precedence.live():
                async with self._live:
                    return await self._begin(claim, spent)
        async with self._batch:
            await self._precedence.give_way()
            return await self._begin(claim, spent)

    async def _begin(self, claim: Claimed, spent: Spending) -> Outcome:
        """Process the item, unless its job's money was spent while it waited for a slot."""
        if claim.cost_cap is not None:
            try:
                affords = await asyncio.to_thread(self._store.affords, claim)
            except AsapError:  # the database is away
                affords = False
            if not affords:
                return Outcome.release(claim)
        with charged_to(spent):
            return await self._process(claim)

    async def _process(self, claim: Claimed) -> Outcome:
        """What the stage made of the item; every error is an outcome."""
        try:
            given = self._read(claim)
            async with asyncio.timeout(self._limits.timeout_s):
                result = await self._stage.process(given)
        except TimeoutError:
            problem = ItemProblem("upstream-timeout", "the stage took too long")
            return self._retry_or_fail(claim, problem, retryable=True)
        except AsapError as error:
            retry_after = error.context.get("retry_after_s")
            after_s = float(retry_after) if isinstance(retry_after, int | float) else 0.0
            if isinstance(error, CapacityError):
                # No fault of the item's, so no attempt, however often; its job's deadline ends it.
                seconds = max(after_s, self._backoff_s(self._limits.max_attempts))
                waiting = Outcome.wait(claim, claim.payload, seconds)
                return replace(waiting, problem=item_problem(error))
            return self._retry_or_fail(
                claim, item_problem(error), retryable=error.retryable, after_s=after_s
            )
        except Exception:  # a defect of ours: logged by its place, shown without a word of it
            self._log.exception("item.crashed")
            problem = ItemProblem("internal-error", "an error of ours; the log has it")
            return Outcome.fail(claim, problem)
        payload = result.payload.model_dump_json().encode()
        if isinstance(result, Wait):
            return Outcome.wait(claim, payload, result.seconds)
        return Outcome.done(claim, payload, next_stage(result.payload, self._stage.name))

    def _read(self, claim: Claimed) -> Payload:
        """The claim's payload. Raises CapacityError for one that this release cannot read: another
        one wrote it, and during an update there are workers of both.
        """
        try:
            return read_payload(claim.payload)
        except ValidationError:
            self._log.warning("item.of_another_release")
            raise CapacityError(
                "a worker of another release wrote the item, and this one cannot read it",
                code="not-ready",
            ) from None  # its text quotes the item

    def _retry_or_fail(
        self,
        claim: Claimed,
        problem: ItemProblem,
        *,
        retryable: bool,
        after_s: float = 0.0,
    ) -> Outcome:
        if not retryable or claim.attempt + 1 >= self._limits.max_attempts:
            return Outcome.fail(claim, problem)
        return Outcome.retry(claim, problem, max(after_s, self._backoff_s(claim.attempt)))

    def _backoff_s(self, failures: int) -> float:
        """A random wait, longer after more failures."""
        limits = self._limits
        return random.uniform(0, min(limits.backoff_cap_s, limits.backoff_base_s * 2**failures))
