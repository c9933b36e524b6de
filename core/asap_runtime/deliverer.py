"""The deliverer's loop: takes due deliveries and reports ended jobs to their webhooks.

Every replica may run one; claims are exclusive. The event holds counts, never text of a trace.
"""

from __future__ import annotations

import asyncio
import json

from asap_runtime.database import Database
from asap_runtime.deliveries import Deliveries, Delivery
from asap_runtime.ledger import JobLedger, JobView
from asap_runtime.logs import get_logger
from asap_runtime.phases import count_of
from asap_runtime.tables import FINAL
from asap_runtime.webhooks import Answer, WebhookCaller, WebhookSettings

__all__ = ["Deliverer", "job_ended"]

PERIOD_S = 1.0
AT_ONCE = 32
"""Calls of one pass, all at the same time: a slow receiver holds up a pass for one call's time."""


def job_ended(view: JobView) -> tuple[str, bytes]:
    """Id and JSON body of the event that this job has ended; the same at every try.

    A job that ends again, after a retry of its failed items, is another event.
    """
    assert view.facts.finished_at is not None
    event_id = f"{view.id}.{view.facts.finished_at}"
    event = {
        "type": "job.ended",
        "id": event_id,
        "created_at": view.facts.finished_at / 1e6,
        "job": {
            "id": view.id,
            "kind": view.kind,
            "phase": view.phase,
            "total": count_of(view.counts, *FINAL),
            "succeeded": count_of(view.counts, "succeeded"),
            "failed": count_of(view.counts, "failed"),
            "cancelled": count_of(view.counts, "cancelled"),
            "problems": len(view.problems),
        },
    }
    return event_id, json.dumps(event).encode()


class Deliverer:
    """One pass a second over the due deliveries, more while a pass is full."""

    def __init__(
        self,
        database: Database,
        settings: WebhookSettings,
        *,
        caller: WebhookCaller | None = None,
        period_s: float = PERIOD_S,
    ) -> None:
        self._settings, self._period_s = settings, period_s
        self._deliveries, self._ledger = Deliveries(database), JobLedger(database)
        self._caller = caller or WebhookCaller(settings)
        self._log = get_logger()

    async def run(self) -> None:
        """Deliver until cancelled; returns at once where no host may be called.

        Trouble with the database is logged and tried again.
        """
        while self._settings.hosts:
            full = False
            try:
                full = await self.deliver() == AT_ONCE
            except Exception:
                self._log.exception("deliverer.failed")
            await asyncio.sleep(0 if full else self._period_s)

    async def deliver(self) -> int:
        """One pass: what is due now, each called once; how many."""
        claimed = await asyncio.to_thread(self._deliveries.claim, AT_ONCE)
        await asyncio.gather(*map(self._deliver, claimed))
        return len(claimed)

    async def _deliver(self, delivery: Delivery) -> None:
        try:
            view = await asyncio.to_thread(self._ledger.job, delivery.tenant, delivery.job_id)
            if view is None or view.facts.finished_at != delivery.finished_at:
                return  # deleted, or opened again: its next end is a delivery of its own
            answer = await self._caller.send(delivery.url, *job_ended(view))
            await asyncio.to_thread(self._save, delivery, answer)
        except Exception:  # the lease gives it back, and the try has counted
            self._log.exception("webhook.failed", job_id=delivery.job_id)
            return
        self._log.info(
            "webhook.called",
            job_id=delivery.job_id,
            attempt=delivery.attempt,
            answer=answer.kind,
            reason=answer.reason,
        )

    def _save(self, delivery: Delivery, answer: Answer) -> None:
        if answer.kind == "failed":
            self._deliveries.fail(delivery, answer.reason)
        elif answer.kind == "delivered":
            self._deliveries.end(delivery, "delivered")
        else:
            self._deliveries.end(delivery, f"{answer.kind}: {answer.reason}")
