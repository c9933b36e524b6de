"""Bodies of requests and answers: envelopes around the library's own types, no second set of
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    model_validator,
)

from asap.eval_config import EvalConfig
from asap.runs import TrainProgress, TrainResult, TrainRun
from asap.train_config import TrainConfig
from asap.types import Triple
from asap_gateway.evaluation_schemas import EvaluationBody
from asap_runtime.models import MODEL_NAME
from asap_runtime.queue import BACKGROUND, BATCH
from asap_runtime.values import ItemProblem
from asap_runtime.views import ErrorSummary, ItemView, JobView

__all__ = [
    "PRIORITIES",
    "TAG",
    "EstimateBody",
    "EvaluateRequest",
    "ItemBody",
    "ItemPage",
    "JobBody",
    "JobOptions",
    "JobPage",
    "JobRequest",
    "ProblemView",
    "PruneRequest",
    "Submission",
    "TrainBody",
    "TrainEstimateBody",
    "TrainRequest",
]

PRIORITIES: Final = {"batch": BATCH, "background": BACKGROUND}
JOB_ID: Final = r"^[0-9a-f]{32}$"
ASKED_MODEL: Final = (
    r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?(@[1-9][0-9]{0,8})?$"
)

Config = Annotated[
    dict[str, Any],
    Field(description="Fields of PruneConfig; missing ones have their defaults."),
]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PruneRequest(_Body):
    """One triple, answered with its pruned record."""

    triple: Triple
    config: Config = {}
    wait_s: float = Field(30.0, ge=0, le=60, allow_inf_nan=False, strict=True)
    """Longest wait for the record; 202 and a Location after it."""


class _Options(_Body):
    """What may be said of a job of any kind."""

    priority: Literal["batch", "background"] = "batch"
    webhook: str | None = Field(None, max_length=2048)
    """https address of an allowed host, told when the job has ended."""
    deadline_s: float | None = Field(None, ge=1, le=30 * 86400, allow_inf_nan=False)
    """Items that are not done so long after the submission fail."""
    dry_run: bool = False
    """Answer 200 with an estimate; nothing is kept."""


class JobOptions(_Options):
    """What may be said of a prune job, wherever its triples come from."""

    config: Config = {}
    cost_cap_usd: float | None = Field(None, gt=0, le=1e9, allow_inf_nan=False)
    """LLM calls of the job stop at this sum."""


class JobRequest(JobOptions):
    """Many triples, pruned in the background, from one of three sources."""

    kind: Literal["prune"] = "prune"
    triples: list[Triple] | None = Field(None, min_length=1)
    dataset: str | None = Field(None, max_length=1024)
    """URI of a file in the server's blob store."""
    scores_from: str | None = Field(None, max_length=64)
    """A finished job: its scores are used again, with another target and no model."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [self.triples, self.dataset, self.scores_from]
        if sum(source is not None for source in given) != 1:
            raise ValueError("expected exactly one of triples, dataset and scores_from")
        return self


class TrainRequest(_Options):
    """A model to train, from one of two sources. The data is gathered in the background."""

    kind: Literal["train"]
    config: TrainConfig = TrainConfig()
    base: str = Field(
        min_length=1, max_length=512, pattern=r"^[^\s\x00-\x1f\x7f-][^\x00-\x1f\x7f]*$"
    )
    """Where to start: a model's hub name, or `name@version` of the registry."""
    model: str = Field(pattern=MODEL_NAME)
    """Name of the result in the registry, which gives it the next version."""
    job: str | None = Field(None, pattern=JOB_ID)
    """An ended prune job: its records are trained on."""
    dataset: str | None = Field(None, max_length=1024)
    """URI of a file in the server's blob store: records, chats, triples, or prompts with
    completions.
    """
    common_with: list[Annotated[str, Field(min_length=1, max_length=1024)]] = Field(
        [], max_length=16
    )
    """Ended prune jobs by their ids, or files by their URIs: only what is in all of them is trained
    on.
    """

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.job is None) == (self.dataset is None):
            raise ValueError("expected exactly one of job and dataset")
        return self


class EvaluateRequest(_Options):
    """A model to be asked benchmarks of the server, and graded."""

    kind: Literal["evaluate"]
    model: str = Field(max_length=256, pattern=ASKED_MODEL)
    """`name@version` of the registry, a name of it (its version in production, else the newest), or
    the name by which the evaluator's server, or the hub, knows a model.
    """
    config: EvalConfig = EvalConfig()


TAG: Final = "kind="
"""How the parts of an error's location begin that name a kind of body and no field."""


def _kind_of(body: object) -> str:
    kind = body.get("kind") if isinstance(body, Mapping) else None
    return f"{TAG}{'prune' if kind is None else kind}"


Submission = Annotated[
    Annotated[JobRequest, Tag(f"{TAG}prune")]
    | Annotated[TrainRequest, Tag(f"{TAG}train")]
    | Annotated[EvaluateRequest, Tag(f"{TAG}evaluate")],
    Discriminator(
        _kind_of,
        custom_error_type="unknown_kind",
        custom_error_message="kind must be one of prune, train and evaluate",
    ),
]
"""The body of POST /jobs: by `kind`, which is `prune` where it is missing."""


class EstimateBody(_Body):
    """What a job would take: the answer to `dry_run`. An estimate, not a promise.

    Tokens of records beyond the first `sample_records` are their characters at the sample's mean.
    """

    records: int
    bad_lines: int
    """Lines that cannot be used; they would be failed items."""
    cot_tokens: int
    llm_calls: int
    prompt_tokens: int
    completion_tokens: int
    scored_tokens: int
    cost_usd: float | None
    """Of the LLM calls; null when this server knows no prices."""
    tokenizer: str
    sampled: bool
    sample_records: int


class TrainEstimateBody(_Body):
    """What a run would be trained on: the answer to `dry_run`. Before `common_with`, and before
    samples are dropped for their length.
    """

    samples: int
    tokens: int
    """Of all samples, without what a chat template adds."""
    tokenizer: str
    sample_records: int
    """So many were counted; their mean stands for the others."""


class ProblemView(BaseModel):
    """RFC 9457 problem details; the media type is application/problem+json."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    instance: str | None = None
    errors: list[dict[str, str]] | None = None
    retry_after_s: float | None = None


class ItemProblemBody(_Body):
    """Why an item failed."""

    code: str
    detail: str
    context: dict[str, JsonValue]

    @classmethod
    def of(cls, problem: ItemProblem | None) -> ItemProblemBody | None:
        """The body of a stored problem."""
        if problem is None:
            return None
        return cls(code=problem.code, detail=problem.detail, context=dict(problem.context))


class StageCountBody(_Body):
    """So many items stand at one stage in one status."""

    stage: str | None
    status: str
    items: int


class ErrorCountBody(_Body):
    """One problem code: how many items have it, and what the first of them says."""

    code: str
    items: int
    first_line: int
    detail: str


class TrainBody(_Body):
    """How a training job stands, beside its phase. Null before its data has been gathered."""

    base: str
    model: str
    version: int | None
    """Of `model` in the registry, once the run has ended well and until that version is removed."""
    attempt: int | None
    """Counts launches from 0; null before the first."""
    progress: TrainProgress | None
    result: TrainResult | None
    meta: dict[str, JsonValue]
    """Where the data came from."""

    @classmethod
    def of(cls, run: TrainRun, version: int | None) -> TrainBody:
        """The body of a run."""
        return cls(
            base=run.base,
            model=run.model,
            version=version,
            attempt=None if run.launch is None else run.launch.attempt,
            progress=run.progress,
            result=run.result,
            meta=run.meta,
        )


class JobBody(_Body):
    """A job: its phase follows from its items. Times are seconds since the epoch."""

    id: str
    kind: str
    phase: str
    created_at: float
    finished_at: float | None
    deadline_at: float | None
    """Items that are not done by then fail."""
    total: int
    counts: list[StageCountBody]
    cost_usd: float
    """Spent on LLM calls so far, where prices are known."""
    cost_cap_usd: float | None
    webhook: bool
    """Whether the end of the job is reported to an address."""
    config: dict[str, JsonValue]
    problems: list[ItemProblemBody]
    error_summary: list[ErrorCountBody] | None
    """The five most frequent problem codes of failed items. Null in lists and while it runs."""
    train: TrainBody | None
    """Of a training job, once its data has been gathered. Null in lists."""
    evaluation: EvaluationBody | None
    """Of an evaluation, once its questions are there. Null in lists."""

    @classmethod
    def of(
        cls,
        view: JobView,
        errors: Sequence[ErrorSummary] | None = None,
        train: TrainBody | None = None,
        evaluation: EvaluationBody | None = None,
    ) -> JobBody:
        """The body of a job, with what went wrong in it when it has ended."""
        facts = view.facts
        counts = [
            StageCountBody(stage=c.stage, status=c.status, items=c.items) for c in view.counts
        ]
        return cls(
            id=view.id,
            kind=view.kind,
            phase=view.phase,
            created_at=facts.created_at / 1e6,
            finished_at=_millionths(facts.finished_at),
            deadline_at=_millionths(facts.expires_at),
            total=sum(count.items for count in counts),
            counts=counts,
            cost_usd=view.cost / 1e6,
            cost_cap_usd=_millionths(view.cost_cap),
            webhook=view.webhook is not None,
            config=dict(view.config),
            problems=[p for problem in view.problems if (p := ItemProblemBody.of(problem))],
            error_summary=None
            if errors is None
            else [
                ErrorCountBody(code=e.code, items=e.items, first_line=e.first_line, detail=e.detail)
                for e in errors
            ],
            train=train,
            evaluation=evaluation,
        )


def _millionths(stored: int | None) -> float | None:
    """Seconds or US dollars, from the unit in which they are stored."""
    return None if stored is None else stored / 1e6


class JobPage(_Body):
    """Jobs, newest first."""

    jobs: list[JobBody]
    next_cursor: str | None


class ItemBody(_Body):
    """One item without its text."""

    position: int
    line: int
    custom_id: str | None
    stage: str | None
    status: str
    attempt: int
    cost_usd: float
    problem: ItemProblemBody | None

    @classmethod
    def of(cls, view: ItemView) -> ItemBody:
        """The body of an item."""
        return cls(
            position=view.position,
            line=view.line,
            custom_id=view.custom_id,
            stage=view.stage,
            status=view.status,
            attempt=view.attempt,
            cost_usd=view.cost / 1e6,
            problem=ItemProblemBody.of(view.problem),
        )


class ItemPage(_Body):
    """Items in input order."""

    items: list[ItemBody]
    next_cursor: int | None
