"""How a training run comes in: a job of one item, whose data is gathered in the background."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any

from asap.errors import InvalidInput, NotFound
from asap.estimate import RoughCounter
from asap.ports import TokenCounter
from asap_gateway.background_jobs import create_in_background
from asap_gateway.schemas import TrainEstimateBody, TrainRequest
from asap_gateway.settings import GatewayLimits
from asap_runtime.blobs import BlobStore
from asap_runtime.database import Database
from asap_runtime.datasets import ENDINGS, ending_of
from asap_runtime.exports import check_data, is_job, records_in
from asap_runtime.ingest import Ingester, stored_lines
from asap_runtime.intake import JobIntake, StoredRun
from asap_runtime.ledger import JobLedger
from asap_runtime.models import ModelRegistry, parse_reference
from asap_runtime.rebudgeting import ended_job
from asap_runtime.webhooks import WebhookSettings, check_url

__all__ = ["TrainSubmissions"]

SAMPLE = 1000
"""Samples whose tokens are counted; the mean stands for the others."""
TEXTS = ("question", "cot", "pruned_cot", "answer", "prompt", "completion")


class TrainSubmissions:
    """Takes training runs in. Blocking.

    Args:
        counter: of tokens, for estimates; None: rough ones.
    """

    def __init__(
        self,
        database: Database,
        blobs: BlobStore,
        limits: GatewayLimits,
        webhooks: WebhookSettings,
        counter: TokenCounter | None,
        ingester: Ingester,
    ) -> None:
        self._blobs, self._limits, self._webhooks = blobs, limits, webhooks
        self._counter, self._ingester = counter or RoughCounter(), ingester
        self._intake, self._ledger = JobIntake(database), JobLedger(database)
        self._registry = ModelRegistry(database)

    def submit(self, tenant: str, request: TrainRequest, key: str | None) -> str:
        """The id of a new job. Raises InvalidInput, NotFound, or Conflict while a job that is
        named still runs.
        """
        source = self._source(tenant, request)
        return create_in_background(self._intake, self._ingester, tenant, request, source, key)

    def estimate(self, tenant: str, request: TrainRequest) -> TrainEstimateBody:
        """What would be trained on; nothing is kept."""
        [data, *_] = self._source(tenant, request).sources
        if is_job(data):
            total = records_in(ended_job(self._ledger, tenant, data, pointer="/job"))
            return self._estimate(self._texts_of_job(tenant, data), total)
        with closing(self._texts_of_file(data)) as texts:
            return self._estimate(texts, None)

    def _estimate(self, texts: Iterable[str], total: int | None) -> TrainEstimateBody:
        """Of a job only the first texts are read: how many there are is known."""
        seen = tokens = 0
        for text in texts:
            seen += 1
            if seen <= SAMPLE:
                tokens += self._counter.count(text)
            elif total is not None:
                break
        counted, samples = min(seen, SAMPLE), seen if total is None else total
        return TrainEstimateBody(
            samples=samples,
            tokens=round(tokens * samples / max(counted, 1)),
            tokenizer=self._counter.tokenizer_name,
            sample_records=counted,
        )

    def _source(self, tenant: str, request: TrainRequest) -> StoredRun:
        if request.webhook is not None:
            check_url(request.webhook, self._webhooks)
        reference = parse_reference(request.base)
        if reference is not None:
            try:
                self._registry.get(tenant, *reference)
            except NotFound as error:
                raise _wrong("/base", error.detail) from None
        if request.job is not None:
            data = self._job(tenant, request.job, "/job")
        else:
            data = self._file(tenant, request.dataset or "", "/dataset")
        common = (
            self._origin(tenant, origin, f"/common_with/{number}")
            for number, origin in enumerate(request.common_with)
        )
        return StoredRun(request.base, request.model, (data, *common))

    def _origin(self, tenant: str, origin: str, pointer: str) -> str:
        read = self._file if "://" in origin else self._job
        return read(tenant, origin, pointer)

    def _job(self, tenant: str, job_id: str, pointer: str) -> str:
        records_in(ended_job(self._ledger, tenant, job_id, pointer=pointer))
        return job_id

    def _file(self, tenant: str, uri: str, pointer: str) -> str:
        try:
            key = self._blobs.resolve(uri, tenant)
        except InvalidInput as error:
            raise _wrong(pointer, error.detail) from None
        if ending_of(key) is None:
            raise _wrong(pointer, f"the file's name must end in one of {', '.join(ENDINGS)}")
        check_data(self._blobs, key)
        return key

    def _texts_of_job(self, tenant: str, job_id: str) -> Iterator[str]:
        for result in self._ledger.results(tenant, job_id):
            if result.payload is not None:
                yield _text(json.loads(result.payload))

    def _texts_of_file(self, key: str) -> Generator[str, None, None]:
        limits = self._limits.intake().read
        with closing(stored_lines(self._blobs, key, ending_of(key) or "", limits)) as lines:
            for line in lines:
                if line.row is not None:
                    yield _text(line.row)


def _text(row: Mapping[str, Any]) -> str:
    """About what of a row is trained on, whatever its layout."""
    if isinstance(triple := row.get("triple"), Mapping):
        row = {**triple, "cot": None, "pruned_cot": row.get("pruned_cot")}
    parts = [row.get(name) for name in TEXTS]
    messages = row.get("messages")
    if isinstance(messages, list):
        parts += [turn.get("content") for turn in messages if isinstance(turn, Mapping)]
    return "\n".join(part for part in parts if isinstance(part, str))


def _wrong(pointer: str, detail: str) -> InvalidInput:
    return InvalidInput(detail, errors=[{"pointer": pointer, "detail": detail}])
