"""What the routes read and stop, without HTTP. Blocking.

Every method takes the tenant first, and another tenant's job does not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fastapi import Request

from asap.errors import NotFound, UpstreamUnavailable
from asap.runs import TrainRun
from asap.types import Record
from asap_gateway.evaluation_reports import EvaluationReports
from asap_gateway.evaluations import EvaluationSubmissions
from asap_gateway.schemas import ItemBody, ItemPage, JobBody, JobPage, TrainBody
from asap_gateway.settings import GatewayLimits
from asap_gateway.submissions import ServerKnowledge, Submissions
from asap_gateway.training import TrainSubmissions
from asap_gateway.waiting import Waits
from asap_runtime.audit import AuditTrail
from asap_runtime.blobs import BlobStore
from asap_runtime.database import Database
from asap_runtime.idempotency import IdempotencyKeys
from asap_runtime.ledger import JobLedger
from asap_runtime.migrate import has_schema
from asap_runtime.models import ModelRegistry
from asap_runtime.precedence import Precedence
from asap_runtime.queue import TaskQueue
from asap_runtime.run_removal import JobRemoval
from asap_runtime.tables import ItemStatus

__all__ = ["Gateway", "get_gateway"]


NOTHING_KNOWN = ServerKnowledge()


class Gateway:
    """The jobs and models of one server's tenants; `submissions` takes new jobs in, `training` and
    `evaluations` those of their kind.
    """

    def __init__(
        self,
        database: Database,
        queue: TaskQueue,
        limits: GatewayLimits,
        blobs: BlobStore,
        knowledge: ServerKnowledge = NOTHING_KNOWN,
        *,
        wake: Callable[[], None] = lambda: None,
        precedence: Precedence | None = None,
    ) -> None:
        self.queue, self.limits = queue, limits
        self.precedence = precedence or Precedence()
        self.submissions = Submissions(database, queue, limits, blobs, knowledge, wake)
        self.training = TrainSubmissions(
            database,
            blobs,
            limits,
            knowledge.webhooks,
            knowledge.counter,
            self.submissions.ingester,
        )
        self.evaluations = EvaluationSubmissions(
            database,
            knowledge.benchmarks,
            knowledge.webhooks,
            knowledge.counter,
            self.submissions.ingester,
        )
        self.reports = EvaluationReports(database)
        self.models, self._blobs = ModelRegistry(database), blobs
        self._removal = JobRemoval(database, blobs)
        self.idempotency, self.audit = IdempotencyKeys(database), AuditTrail(database)
        self._database, self._ledger = database, JobLedger(database)
        self.waits = Waits(self._ledger, limits.max_waits)
        self._leaving = False

    def job(self, tenant: str, job_id: str) -> JobBody:
        """The job. Raises NotFound."""
        view = self._ledger.job(tenant, job_id)
        if view is None:
            raise _no_job(job_id)
        ended = view.facts.finished_at is not None
        errors = self._ledger.error_summary(tenant, job_id) if ended else None
        train = self._train(tenant, job_id) if view.kind == "train" else None
        evaluation = self.reports.body(tenant, view) if view.kind == "evaluate" else None
        return JobBody.of(view, errors, train, evaluation)

    def kind(self, tenant: str, job_id: str) -> str:
        """The kind of the job: prune, train or evaluate. Raises NotFound."""
        kind = self._ledger.kind(tenant, job_id)
        if kind is None:
            raise _no_job(job_id)
        return kind

    def jobs(self, tenant: str, cursor: str | None, limit: int) -> JobPage:
        """A page of jobs, newest first."""
        views = self._ledger.jobs(tenant, cursor, limit)
        following = views[-1].cursor if len(views) == limit else None
        return JobPage(jobs=[JobBody.of(view) for view in views], next_cursor=following)

    def items(
        self, tenant: str, job_id: str, cursor: int | None, limit: int, status: ItemStatus | None
    ) -> ItemPage:
        """A page of items in input order."""
        self.kind(tenant, job_id)
        views = self._ledger.items(tenant, job_id, cursor, limit, status)
        following = views[-1].position if len(views) == limit else None
        return ItemPage(items=[ItemBody.of(view) for view in views], next_cursor=following)

    def lines(self, tenant: str, job_id: str) -> Iterator[bytes]:
        """What succeeded items hold, a line of JSON each, in input order."""
        for result in self._ledger.results(tenant, job_id):
            if result.payload is not None:
                yield result.payload + b"\n"

    def records(self, tenant: str, job_id: str) -> Iterator[Record]:
        """Succeeded records of a prune job in input order."""
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
        self.kind(tenant, job_id)
        self._ledger.retry_failed(tenant, job_id)
        return self.job(tenant, job_id)

    def delete(self, tenant: str, job_id: str) -> None:
        """Stop and delete the job; of a training job the files, too, but for a model's in the
        registry.
        """
        if not self._removal.delete(tenant, job_id):
            raise _no_job(job_id)

    def delete_model(self, tenant: str, name: str, version: int) -> None:
        """Delete a version with its files. Raises NotFound, or Conflict while in production."""
        self._blobs.delete_below(self.models.remove(tenant, name, version).prefix)

    def _train(self, tenant: str, job_id: str) -> TrainBody | None:
        payload = self._ledger.first_payload(tenant, job_id)
        if payload is None:
            return None
        made = self.models.of_job(tenant, job_id)
        run = TrainRun.model_validate_json(payload)
        return TrainBody.of(run, None if made is None else made.version)

    def check_ready(self) -> None:
        """Raise AsapError while requests had better go elsewhere."""
        if self._leaving:
            raise UpstreamUnavailable("this server is leaving", code="not-ready")
        if not has_schema(self._database.engine):
            raise UpstreamUnavailable("the database has an old schema", code="not-ready")

    def leave(self) -> None:
        """The process is asked to stop: not ready, and whoever waits is answered now."""
        self._leaving = True
        self.waits.stop()


def _no_job(job_id: str) -> NotFound:
    return NotFound(f"there is no job {job_id[:64]!r}")


def get_gateway(request: Request) -> Gateway:
    """The gateway of the running application."""
    gateway: Gateway = request.app.state.gateway
    return gateway
