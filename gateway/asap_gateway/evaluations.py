"""How an evaluation comes in: a job of one item for each question, which are read in the
background.
"""

from __future__ import annotations

from asap.errors import AsapError, InvalidInput, NotFound
from asap.estimate import RoughCounter
from asap.eval_config import EvalConfig
from asap.ports import TokenCounter
from asap_gateway.background_jobs import create_in_background
from asap_gateway.evaluation_schemas import EvaluateEstimateBody
from asap_gateway.schemas import EvaluateRequest
from asap_runtime.benchmarks import BenchmarkFolder
from asap_runtime.database import Database
from asap_runtime.evaluations import load_questions
from asap_runtime.ingest import Ingester
from asap_runtime.intake import JobIntake, StoredEvaluation
from asap_runtime.models import ModelRegistry, parse_reference
from asap_runtime.webhooks import WebhookSettings, check_url

__all__ = ["EvaluationSubmissions"]

SAMPLE = 1000
"""Prompts whose tokens are counted; the mean stands for the others."""
MOST_GENERATIONS = 1000
"""Of one question: an item holds them all."""


class EvaluationSubmissions:
    """Takes evaluations in. Blocking.

    Args:
        counter: of tokens, for estimates; None: rough ones.
    """

    def __init__(
        self,
        database: Database,
        benchmarks: BenchmarkFolder,
        webhooks: WebhookSettings,
        counter: TokenCounter | None,
        ingester: Ingester,
    ) -> None:
        self._benchmarks, self._webhooks = benchmarks, webhooks
        self._counter, self._ingester = counter or RoughCounter(), ingester
        self._intake, self._registry = JobIntake(database), ModelRegistry(database)

    def submit(self, tenant: str, request: EvaluateRequest, key: str | None) -> str:
        """The id of a new job. Raises InvalidInput."""
        source = self._source(tenant, request)
        return create_in_background(self._intake, self._ingester, tenant, request, source, key)

    def estimate(self, tenant: str, request: EvaluateRequest) -> EvaluateEstimateBody:
        """What would be asked; nothing is kept."""
        self._source(tenant, request)
        config = request.config
        questions = load_questions(self._benchmarks, config)
        budgets = [config.budgets_of(first.benchmark) for first, *_ in questions.groups]
        sample = [first.prompt for first, *_ in questions.groups[:SAMPLE]]
        prompt_tokens = sum(map(self._counter.count, sample)) / len(sample)
        generations = config.samples * sum(map(len, budgets))
        return EvaluateEstimateBody(
            benchmarks=dict(questions.data),
            questions=len(questions.groups),
            generations=generations,
            prompt_tokens=round(prompt_tokens * generations),
            most_completion_tokens=config.samples * sum(map(sum, budgets)),
            tokenizer=self._counter.tokenizer_name,
        )

    def _source(self, tenant: str, request: EvaluateRequest) -> StoredEvaluation:
        if request.webhook is not None:
            check_url(request.webhook, self._webhooks)
        _check_size(request.config)
        for number, name in enumerate(request.config.benchmarks):
            try:
                self._benchmarks.check(name)
            except InvalidInput as error:
                raise _wrong(f"/config/benchmarks/{number}", error) from None
        return self._model(tenant, request.model)

    def _model(self, tenant: str, model: str) -> StoredEvaluation:
        """What the name stands for now: what is put into production later changes nothing."""
        name, version = parse_reference(model) or (model, None)
        try:
            found = self._registry.get(tenant, name, version)
        except NotFound as error:
            if version is not None:
                raise _wrong("/model", error) from None
            return StoredEvaluation(model, None, None)
        return StoredEvaluation(found.reference, found.prefix, found.manifest_sha256)


def _check_size(config: EvalConfig) -> None:
    for name in config.benchmarks:
        generations = len(config.budgets_of(name)) * config.samples
        if generations > MOST_GENERATIONS:
            error = InvalidInput(
                f"{generations} completions of each question; at most {MOST_GENERATIONS}"
            )
            raise _wrong("/config/samples", error)


def _wrong(pointer: str, error: AsapError) -> InvalidInput:
    return InvalidInput(error.detail, errors=[{"pointer": pointer, "detail": error.detail}])
