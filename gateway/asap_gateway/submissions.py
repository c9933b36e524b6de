"""How work comes in: one triple or many, the rows first, the queue hears of them afterwards.

A single prune is a job of one: from `_create` on both doors lead the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from asap.config import PruneConfig
from asap.errors import AsapError, InvalidInput
from asap.estimate import Prices
from asap.ports import TokenCounter
from asap.types import Triple
from asap_gateway.admission import Admission
from asap_gateway.configs import read_config
from asap_gateway.estimates import SAMPLE, check_cap, estimate_job, require_prices
from asap_gateway.schemas import PRIORITIES, EstimateBody, JobOptions, JobRequest
from asap_gateway.settings import GatewayLimits
from asap_runtime.benchmarks import BenchmarkFolder
from asap_runtime.blobs import BlobStore
from asap_runtime.database import Database
from asap_runtime.datasets import ENDINGS, ending_of
from asap_runtime.ingest import Ingester, detect, new_item, stored_triples
from asap_runtime.intake import JobIntake, Source, StoredLines, StoredScores
from asap_runtime.ledger import JobLedger
from asap_runtime.queue import LIVE, Message, TaskQueue
from asap_runtime.rebudgeting import ended_job, rebudgeted_values
from asap_runtime.sweep import Sweep
from asap_runtime.telemetry import span, trace_context, trace_parent
from asap_runtime.values import micro_usd
from asap_runtime.webhooks import WebhookSettings, check_url

__all__ = ["ServerKnowledge", "Submissions"]


@dataclass(frozen=True, slots=True)
class ServerKnowledge:
    """What a server knows beside its limits; each part may be missing."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of a configuration that a request leaves out."""
    webhooks: WebhookSettings = field(default_factory=WebhookSettings)
    prices: Prices | None = None
    """Of the LLM; without them nothing is metered, and no cost cap is taken."""
    counter: TokenCounter | None = None
    """The scorer's tokenizer, for estimates; without it they are rough."""
    benchmarks: BenchmarkFolder = field(default_factory=BenchmarkFolder)
    """What evaluations may name."""


class Submissions:
    """Takes jobs in. Blocking. What is stored first, its `ingester` takes in.

    Args:
        wake: called after new items are in the database; the sweeper publishes them in turn.
    """

    def __init__(
        self,
        database: Database,
        queue: TaskQueue,
        limits: GatewayLimits,
        blobs: BlobStore,
        knowledge: ServerKnowledge,
        wake: Callable[[], None],
    ) -> None:
        self.blobs = blobs
        self.ingester = Ingester(
            database,
            blobs,
            limits.intake(),
            lambda job_id: wake(),
            benchmarks=knowledge.benchmarks,
        )
        self._queue, self._limits, self._knowledge, self._wake = queue, limits, knowledge, wake
        self._intake, self._ledger = JobIntake(database), JobLedger(database)
        self._sweep = Sweep(database)
        self._admission = Admission(self._ledger, limits)

    def prune(self, tenant: str, triple: Triple, given: Mapping[str, Any], key: str | None) -> str:
        """The id of a live job of one."""
        config = read_config(given, self._knowledge.defaults)
        _check(triple, "/triple")
        with span("prune"):
            item = new_item(1, triple, config)
            job_id, due = self._intake.create_single(
                tenant,
                "prune",
                config.model_dump(mode="json"),
                LIVE,
                item,
                idempotency_key=key,
                trace=trace_parent(),
            )
            if item.stage is not None:
                message = Message(item.stage, (str(due.id),), LIVE, trace_context())
                if not self._queue.publish(message):
                    self._sweep.withdraw(due)
        return job_id

    def submit(self, tenant: str, request: JobRequest, key: str | None) -> str:
        """The id of a new job. Raises InvalidInput, CostCapReached, Overloaded, NotFound."""
        if request.scores_from is not None:
            self.admit(tenant, 0)
            config = self._again(tenant, request.scores_from, request)
            return self._store(tenant, config, request, key, StoredScores(request.scores_from))
        if request.dataset is not None:
            self.admit(tenant, 0)
            source = self._data_set(tenant, request.dataset)
            return self.submit_stored(tenant, source, request, key)
        triples = request.triples or []
        config = self._config(request)
        _check_all(triples)
        self.admit(tenant, len(triples))
        self._afford(triples, config, request)
        with span("submit", items=len(triples)):
            job_id = self._create(tenant, config, request, key)
            items = (new_item(line, triple, config) for line, triple in enumerate(triples, start=1))
            self._intake.add_items(job_id, items)
            self._intake.mark_ingested(job_id)
        self._wake()
        return job_id

    def submit_stored(
        self, tenant: str, source: StoredLines, options: JobOptions, key: str | None
    ) -> str:
        """The id of a new job of the lines of a stored file, which are taken in afterwards.

        A cost cap is held against the first lines now, and against all of them while they cost.
        """
        config = self._config(options)
        if options.cost_cap_usd is not None:
            with self._reading(source) as lines:
                self._afford(islice(lines, SAMPLE), config, options)
        return self._store(tenant, config, options, key, source)

    def estimate(self, tenant: str, request: JobRequest) -> EstimateBody:
        """What the job would take; nothing is kept."""
        if request.scores_from is not None:
            config = self._again(tenant, request.scores_from, request)
            return self._estimate((), config)  # selection alone: no call, no model
        if request.dataset is not None:
            return self.estimate_stored(self._data_set(tenant, request.dataset), request)
        _check_all(request.triples or [])
        return self._estimate(request.triples or [], self._config(request))

    def estimate_stored(self, source: StoredLines, options: JobOptions) -> EstimateBody:
        """As `estimate`, of a stored file, read once."""
        config = self._config(options)
        with self._reading(source) as lines:
            return self._estimate(lines, config)

    def stored(self, key: str, ending: str, *, owned: bool) -> StoredLines:
        """How to read a stored file. Raises InvalidInput when its first lines have no known
        schema, or cannot be read.
        """
        schema = detect(self.blobs, key, ending, self._limits.intake())
        return StoredLines(key, ending, schema, owned)

    def admit(self, tenant: str, items: int) -> None:
        """Refuse what cannot be taken now; see `Admission.check`."""
        self._admission.check(tenant, items)

    def _config(self, options: JobOptions) -> PruneConfig:
        config = read_config(options.config, self._knowledge.defaults)
        if options.webhook is not None:
            check_url(options.webhook, self._knowledge.webhooks)
        require_prices(options, config, self._knowledge.prices)
        return config

    def _again(self, tenant: str, job_id: str, options: JobOptions) -> PruneConfig:
        view = ended_job(self._ledger, tenant, job_id)
        if options.webhook is not None:
            check_url(options.webhook, self._knowledge.webhooks)
        return read_config(rebudgeted_values(view, options.config), {})

    def _data_set(self, tenant: str, uri: str) -> StoredLines:
        blob = self.blobs.resolve(uri, tenant)
        ending = ending_of(blob)
        if ending is None:
            detail = f"the data set's name must end in one of {', '.join(ENDINGS)}"
            raise InvalidInput(detail, errors=[{"pointer": "/dataset", "detail": detail}])
        return self.stored(blob, ending, owned=False)

    @contextmanager
    def _reading(self, source: StoredLines) -> Iterator[Iterator[Triple | AsapError]]:
        with closing(stored_triples(self.blobs, source, self._limits.intake())) as lines:
            yield (triple for _, triple in lines)

    def _estimate(self, lines: Iterable[Triple | AsapError], config: PruneConfig) -> EstimateBody:
        return estimate_job(lines, config, self._knowledge.counter, self._knowledge.prices)

    def _afford(
        self, lines: Iterable[Triple | AsapError], config: PruneConfig, options: JobOptions
    ) -> None:
        if options.cost_cap_usd is not None:
            check_cap(self._estimate(lines, config), options)

    def _store(
        self, tenant: str, config: PruneConfig, options: JobOptions, key: str | None, source: Source
    ) -> str:
        with span("submit"):
            job_id = self._create(tenant, config, options, key, source)
        self.ingester.wake()
        return job_id

    def _create(
        self,
        tenant: str,
        config: PruneConfig,
        options: JobOptions,
        key: str | None,
        source: Source | None = None,
    ) -> str:
        cap = options.cost_cap_usd
        return self._intake.create_job(
            tenant,
            "prune",
            config.model_dump(mode="json"),
            PRIORITIES[options.priority],
            expires_in_s=options.deadline_s,
            idempotency_key=key,
            trace=trace_parent(),
            webhook=options.webhook,
            cost_cap=None if cap is None else micro_usd(cap),
            source=source,
        )


def _check_all(triples: Sequence[Triple]) -> None:
    for number, triple in enumerate(triples):
        _check(triple, f"/triples/{number}")


def _check(triple: Triple, where: str) -> None:
    try:
        triple.check()
    except InvalidInput as error:
        errors = [{"pointer": f"{where}/{error.context.get('field')}", "detail": error.detail}]
        raise InvalidInput(error.detail, code=error.problem_code, errors=errors) from None
