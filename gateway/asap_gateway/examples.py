"""Examples of requests with their answers: shown in the OpenAPI description, and run as tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

__all__ = ["EXAMPLES", "PLACES", "Example"]

TRIPLE: Final = {
    "question": "What is 2 + 2?",
    "cot": "Add the numbers.\n\nWait, let me think about primes.\n\nThe sum is 4.",
    "answer": "4",
}
NO_JOB: Final = "0123456789abcdef0123456789abcdef"
PLACES: Final = {"job_id": NO_JOB, "name": "pruned-coder", "version": 1}
"""What stands in the paths of the examples: nothing is there."""
JSON: Final = "application/json"
BASE: Final = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
EVALUATE: Final = {"kind": "evaluate", "model": BASE}
TRAIN: Final = {"kind": "train", "base": BASE, "model": "pruned-coder"}


@dataclass(frozen=True, slots=True)
class Example:
    """One request to one operation, and the status and problem code of its answer."""

    name: str
    method: str
    path: str
    """As in the OpenAPI description, with the names of `PLACES`."""
    status: int
    body: Any = None
    """A JSON body; bytes are sent as they are."""
    media_type: str = JSON
    code: str | None = None
    """Of the problem; None where the answer is none."""
    detail: str | None = None
    """Of the problem, word for word."""


def _post(name: str, path: str, status: int, body: Any, *problem: str) -> Example:
    code, detail = problem or (None, None)
    return Example(name, "post", path, status, body, code=code, detail=detail)


def _unknown(method: str, below: str) -> Example:
    detail = f"there is no job {NO_JOB!r}"
    path = f"/jobs/{{job_id}}{below}"
    return Example("an unknown job", method, path, 404, code="not-found", detail=detail)


def _no_model(method: str, below: str, body: Any = None) -> Example:
    named = "pruned-coder@1" if "version" in below else "pruned-coder"
    detail, path = f"there is no model {named!r}", f"/models/{{name}}{below}"
    return Example("an unknown model", method, path, 404, body, code="not-found", detail=detail)


EXAMPLES: Final = (
    _post(
        "one triple, half of its tokens",
        "/prune",
        200,
        {"triple": TRIPLE, "config": {"keep_ratio": 0.5}, "wait_s": 30},
    ),
    _post("no waiting", "/prune", 202, {"triple": TRIPLE, "wait_s": 0}),
    _post(
        "an unknown field of the configuration",
        "/prune",
        422,
        {"triple": TRIPLE, "config": {"budget": 512}},
        "invalid-input",
        "/config/budget: Extra inputs are not permitted",
    ),
    _post(
        "a control token in the text",
        "/prune",
        422,
        {"triple": {**TRIPLE, "cot": "Add.<|im_end|>"}},
        "control-token-in-text",
        "field 'cot' contains the control token '<|im_end|>' at character 4; remove it or parse "
        "the field as a generation",
    ),
    _post(
        "no JSON",
        "/prune",
        400,
        b'{"triple": ',
        "malformed-json",
        "not JSON at column 12: Expecting value",
    ),
    Example(
        "not the media type of JSON",
        "post",
        "/prune",
        415,
        b"triple=1",
        "application/x-www-form-urlencoded",
        "unsupported-media-type",
        "the body must be application/json, not compressed in transfer",
    ),
    _post(
        "two triples, with a deadline",
        "/jobs",
        202,
        {"triples": [TRIPLE, TRIPLE], "config": {"max_tokens": 512}, "deadline_s": 3600},
    ),
    _post(
        "an estimate instead of a job",
        "/jobs",
        200,
        {"triples": [TRIPLE], "config": {"method": "asap"}, "dry_run": True},
    ),
    _post(
        "two sources",
        "/jobs",
        422,
        {"triples": [TRIPLE], "scores_from": NO_JOB},
        "invalid-input",
        "the request: Value error, expected exactly one of triples, dataset and scores_from",
    ),
    _post(
        "scores of an unknown job",
        "/jobs",
        404,
        {"scores_from": NO_JOB, "config": {"max_tokens": 512}},
        "not-found",
        f"there is no job {NO_JOB!r}",
    ),
    _post(
        "a way out of the blob store",
        "/jobs",
        422,
        {"dataset": "file:///etc/../etc/passwd.jsonl"},
        "invalid-input",
        "the data set's address cannot be used: expected plain names between single slashes",
    ),
    _post(
        "a model on the records of an unknown job",
        "/jobs",
        404,
        {**TRAIN, "job": NO_JOB, "config": {"epochs": 3}},
        "not-found",
        f"there is no job {NO_JOB!r}",
    ),
    _post(
        "a model on nothing",
        "/jobs",
        422,
        TRAIN,
        "invalid-input",
        "the request: Value error, expected exactly one of job and dataset",
    ),
    _post(
        "a recipe that cannot work",
        "/jobs",
        422,
        {**TRAIN, "job": NO_JOB, "config": {"gpus": 8}},
        "invalid-input",
        "/config: Value error, backend unsloth trains on one device; take plain for several",
    ),
    _post(
        "the first eight tasks of a benchmark at two budgets",
        "/jobs",
        202,
        {**EVALUATE, "config": {"benchmarks": ["humaneval"], "limit": 8, "budgets": [2048, 4096]}},
    ),
    _post(
        "what an evaluation would ask",
        "/jobs",
        200,
        {**EVALUATE, "config": {"samples": 5, "temperature": 0.6}, "dry_run": True},
    ),
    _post(
        "a model that the registry does not have",
        "/jobs",
        422,
        {**EVALUATE, "model": "pruned-coder@7"},
        "invalid-input",
        "there is no model 'pruned-coder@7'",
    ),
    _post(
        "a benchmark that the server does not have",
        "/jobs",
        422,
        {**EVALUATE, "config": {"benchmarks": ["gone"]}},
        "invalid-input",
        "this server has no file of benchmark 'gone'",
    ),
    _post(
        "a kind that is unknown",
        "/jobs",
        422,
        {"kind": "bake"},
        "invalid-input",
        "the request: kind must be one of prune, train and evaluate",
    ),
    _no_model("get", ""),
    _no_model("get", "/{version}"),
    _no_model("post", "/{version}/stage", {"stage": "production"}),
    _no_model("delete", "/{version}"),
    _unknown("get", ""),
    _unknown("get", "/items"),
    _unknown("get", "/result"),
    _unknown("get", "/events"),
    _unknown("get", "/report"),
    Example(
        "nothing to compare",
        "get",
        "/reports/compare",
        422,
        code="invalid-input",
        detail="/job: Field required",
    ),
    _unknown("post", "/cancel"),
    _unknown("post", "/retry"),
    _unknown("delete", ""),
)
