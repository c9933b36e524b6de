"""What a server of jobs answers: its bodies as values, its problems as the errors they were.

Text of a server is shown on a terminal sooner or later; an error's sentence is made safe here.
"""

from __future__ import annotations

from typing import TypeVar

import httpx
from pydantic import BaseModel, ConfigDict, JsonValue, RootModel, ValidationError

from asap.errors import (
    AsapError,
    Conflict,
    CostCapReached,
    Forbidden,
    InvalidInput,
    NotFound,
    Overloaded,
    StorageFull,
    Unauthorized,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from asap.runs import TrainProgress, TrainResult
from asap_cli.terminal import printable

__all__ = [
    "FINAL",
    "Answer",
    "ErrorCount",
    "Estimate",
    "Evaluation",
    "Item",
    "ItemPage",
    "ItemProblem",
    "Job",
    "JobPage",
    "Model",
    "ModelPage",
    "Plan",
    "StageCount",
    "Training",
    "one_line",
    "parse",
    "refusal",
]

FINAL = ("succeeded", "failed", "cancelled")
_ERRORS: dict[int, type[AsapError]] = {
    **dict.fromkeys((400, 413, 415, 422), InvalidInput),
    401: Unauthorized,
    402: CostCapReached,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    429: Overloaded,
    502: UpstreamError,
    503: UpstreamUnavailable,
    504: UpstreamTimeout,
    507: StorageFull,
}
_SAID_BY_PROXIES = (429, 502, 503, 504)
"""Statuses that mean the same without a problem's body."""


class Answer(BaseModel):
    """Base of all bodies: members that a newer server adds are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class _Problem(Answer):
    """RFC 9457 problem details, as far as they are of use."""

    code: str
    detail: str
    retry_after_s: float | None = None


class ItemProblem(Answer):
    """Why an item failed."""

    code: str
    detail: str


class StageCount(Answer):
    """So many items stand at one stage in one status. Stage None: no stage was needed."""

    stage: str | None
    status: str
    items: int


class ErrorCount(Answer):
    """One problem code: how many items have it, and what the first of them says."""

    code: str
    items: int
    first_line: int
    detail: str


class Training(Answer):
    """How a training job stands, beside its phase."""

    base: str
    model: str
    version: int | None
    """Of `model` in the registry, once the run has ended well."""
    progress: TrainProgress | None
    result: TrainResult | None


class Evaluation(Answer):
    """How an evaluation stands, beside its job's phase."""

    model: str
    questions: int
    generated: int
    done: int


class Job(Answer):
    """A job. Times are seconds since the epoch; in an event there is no `config`."""

    id: str
    kind: str = "prune"
    phase: str
    created_at: float
    finished_at: float | None
    total: int
    counts: tuple[StageCount, ...]
    config: dict[str, JsonValue] = {}
    problems: tuple[ItemProblem, ...] = ()
    cost_usd: float = 0.0
    cost_cap_usd: float | None = None
    error_summary: tuple[ErrorCount, ...] | None = None
    """The most frequent codes, once the job has ended."""
    train: Training | None = None
    evaluation: Evaluation | None = None

    def items(self, *statuses: str) -> int:
        """Items in any of these statuses, over all stages."""
        return sum(count.items for count in self.counts if count.status in statuses)


class JobPage(Answer):
    """Jobs, newest first."""

    jobs: tuple[Job, ...]
    next_cursor: str | None


class Estimate(Answer):
    """What a job would take. `cost_usd` None: the server knows no prices of its LLM."""

    records: int
    bad_lines: int
    cot_tokens: int
    llm_calls: int
    prompt_tokens: int
    completion_tokens: int
    scored_tokens: int
    cost_usd: float | None
    tokenizer: str


class Plan(RootModel[dict[str, JsonValue]]):
    """What a job of another kind than prune would take."""


class Model(Answer):
    """A version of a trained model. `created_at` is in seconds since the epoch."""

    name: str
    version: int
    stage: str
    base: str
    job_id: str
    manifest_sha256: str
    created_at: float
    meta: dict[str, JsonValue]


class ModelPage(Answer):
    """Versions by name, the newest of each first."""

    models: tuple[Model, ...]
    next_cursor: str | None


class Item(Answer):
    """One input line and what became of it."""

    line: int
    status: str
    problem: ItemProblem | None


class ItemPage(Answer):
    """Items in input order."""

    items: tuple[Item, ...]
    next_cursor: int | None


A = TypeVar("A", bound=BaseModel)


def parse(kind: type[A], body: str | bytes, server: str) -> A:
    """The body as a value. Raises UpstreamError when no ASAP server would say so."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise UpstreamError(
            f"what {server} answers is not what an ASAP server answers; is the address right?"
        ) from error


def refusal(response: httpx.Response, server: str) -> AsapError:
    """The error of an answer that is no success and has been read: the problem's code and detail,
    or the bare status where something else has answered.
    """
    status = response.status_code
    try:
        problem = _Problem.model_validate_json(response.content)
    except ValidationError:
        kind = _ERRORS[status] if status in _SAID_BY_PROXIES else UpstreamError
        request = f"{response.request.method} {response.request.url.path}"
        return kind(f"{server} answers {request} with {status}, and not as an ASAP server would")
    kind = _ERRORS.get(status, InvalidInput if status < 500 else UpstreamError)
    facts = {} if problem.retry_after_s is None else {"retry_after_s": problem.retry_after_s}
    detail = one_line(problem.detail)
    if kind is Unauthorized:
        detail += "; this command sends what ASAP_API_KEY holds"
    return kind(detail, code=one_line(problem.code), **facts)


def one_line(text: str) -> str:
    """Foreign text as one harmless line."""
    return printable(" ".join(text.split()))
