"""What the routes read and stop, without HTTP. Blocking.

Every method takes the tenant first, and another tenant's job does not exist.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import Request

from asap.errors import NotFound
from asap.types import Record
from asap_gateway.schemas import ItemBody, ItemPage, JobBody, JobPage
from asap_gateway.settings import GatewayLimits
from asap_gateway.submissions import Submissions
from asap_runtime.database import Database
from asap_runtime.idempotency import IdempotencyKeys
from asap_runtime.ledger import JobLedger
from asap_runtime.queue import TaskQueue
from asap_runtime.tables import ItemStatus

__all__ = ["Gateway", "get_gateway"]


class Gateway:
    """The jobs of one server's tenants; `submissions` takes new ones in."""

    def __init__(
        self,
        database: Database,
        queue: TaskQueue,
        limits: GatewayLimits,
        *,
        defaults: Mapping[str, Any],
    ) -> None:
        self.queue, self.limits = queue, limits
        self.submissions = Submissions(database, queue, limits, defaults=defaults)
        self.idempotency = IdempotencyKeys(database)
        self._database, self._ledger = database, JobLedger(database)

    def job(self, tenant: str, job_id: str) -> JobBody:
        """The job. Raises NotFound."""
        view = self._ledger.job(tenant, job_id)
        if view is None:
            raise _no_job(job_id)
        return JobBody.of(view)

    def jobs(self, tenant: str, cursor: str | None, limit: int) -> JobPage:
        """A page of jobs, newest first."""
        views = self._ledger.jobs(tenant, cursor, limit)
        following = views[-1].cursor if len(views) == limit else None
        return JobPage(jobs=[JobBody.of(view) for view in views], next_cursor=following)

    def items(
        self, tenant: str, job_id: str, cursor: int | None, limit: int, status: ItemStatus | None
    ) -> ItemPage:
        """A page of items in input order."""
        self.job(tenant, job_id)
        views = self._ledger.items(tenant, job_id, cursor, limit, status)
        following = views[-1].position if len(views) == limit else None
        return ItemPage(items=[ItemBody.of(view) for view in views], next_cursor=following)

    def records(self, tenant: str, job_id: str) -> Iterator[Record]:
        """Succeeded records in input order."""
        for result in self._ledger.results(tenant, job_id):
            if result.payload is not None:
                yield Record.model_validate_json(result.payload)

    def cancel(self, tenant: str, job_id: str) -> JobBody:
        """Stop the job; idempotent."""
        if not self._ledger.cancel(tenant, job_id):
            raise _no_job(job_id)
        return self.job(tenant, job_id)

    def retry(self, tenant: str, job_id: str) -> JobBody:
        """Run the failed items of a finished job again."""
        self.job(tenant, job_id)
        self._ledger.retry_failed(tenant, job_id)
        return self.job(tenant, job_id)

    def delete(self, tenant: str, job_id: str) -> None:
        """Stop and delete the job."""
        if not self._ledger.delete(tenant, job_id):
            raise _no_job(job_id)

    def check_database(self) -> None:
        """Raise UpstreamUnavailable when the database does not answer."""
        self._database.time()


def _no_job(job_id: str) -> NotFound:
    return NotFound(f"there is no job {job_id[:64]!r}")


def get_gateway(request: Request) -> Gateway:
    """The gateway of the running application."""
    gateway: Gateway = request.app.state.gateway
    return gateway
