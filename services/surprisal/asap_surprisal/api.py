"""POST /score: scores of steps for callers who have no record and no job, only texts.

An entry takes the same queue as the stage's items. Who goes away takes his entries along; who comes
while the queue is full is told when to come again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from asap.config import ScoreName
from asap.errors import AsapError, CapacityError, InvalidInput
from asap.ports import ScoreRequest
from asap.thinking import check_control_tokens
from asap.types import StepScores
from asap_runtime.http_problems import answer, invalid_input, problem
from asap_runtime.problems import describe
from asap_surprisal.settings import ScorerSettings

__all__ = ["AdmittingScorer", "ScoreAnswer", "ScoreBody", "score_endpoint"]

GONE = 499
"""For logs alone: there is nobody left to read it."""


class AdmittingScorer(Protocol):
    """A scorer with a door."""

    @property
    def name(self) -> str:
        """Model name, for provenance."""

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer."""

    async def score_or_refuse(self, requests: Sequence[ScoreRequest]) -> list[StepScores]:
        """Scores for each request. Raises Overloaded (`retry_after_s`) when too many wait, and
        InvalidInput for what it would never take.
        """


class ScoreBody(BaseModel):
    """One CoT to score: its question and its steps in order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    question: str
    steps: Annotated[tuple[str, ...], Field(min_length=1)]
    scores: Annotated[tuple[ScoreName, ...], Field(min_length=1)] = ("first_token_surprisal",)
    context: Literal["raw", "chat"] = "raw"

    def to_request(self) -> ScoreRequest:
        """The request to the scorer. Raises InvalidInput for a chat control token."""
        for field, text in (("question", self.question), *(("steps", s) for s in self.steps)):
            check_control_tokens(field, text)
        names = tuple(dict.fromkeys(self.scores))
        return ScoreRequest(self.question, self.steps, names, self.context)


class ScoreAnswer(StepScores):
    """One score per step, in nats, and whose they are."""

    model: str
    tokenizer: str


_BODIES = TypeAdapter(tuple[ScoreBody, ...])


def score_endpoint(
    scorer: Callable[[], AdmittingScorer], settings: ScorerSettings
) -> Callable[[Request], Awaitable[Response]]:
    """The handler, for any application.

    Takes one `ScoreBody` or a list of them, and answers with one `ScoreAnswer` or a list. Refusals
    are problems: 400 malformed-json, 413, 422 with JSON pointers or `text-too-long`, 429 and 503
    with `retry_after_s`.

    Args:
        scorer: the started scorer; raises AsapError while there is none.
        settings: the limits.
    """

    async def score(request: Request) -> Response:
        """Scores of the steps of one CoT, or of several."""
        path = request.url.path
        try:
            body = await _read(request, settings.max_body_bytes)
            if body is None:
                detail = f"the body is larger than {settings.max_body_bytes} bytes"
                refusal = problem(413, "payload-too-large", "Payload too large", detail)
                return answer(path, refusal, connection="close")
            try:
                values = from_json(body)
            except ValueError:
                detail = "the body is no JSON"
                return answer(path, problem(400, "malformed-json", "Malformed request", detail))
            requests = _requests(values, settings.max_requests)
            engine = scorer()
            scored = await _unless_gone(request, engine.score_or_refuse(requests))
        except ClientDisconnect:
            return Response(status_code=GONE)
        except AsapError as error:
            title = {"title": "Not ready"} if error.problem_code == "not-ready" else {}
            return answer(path, describe(error) | title)
        answers = [
            ScoreAnswer(
                model=engine.name, tokenizer=engine.tokenizer_name, **scores.model_dump()
            ).model_dump(mode="json")
            for scores in scored
        ]
        return JSONResponse(answers if isinstance(values, list) else answers[0])

    return score


async def _read(request: Request, limit: int) -> bytes | None:
    """The body, or None as soon as it is too large, whatever Content-Length says."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            return None
    return bytes(body)


def _requests(values: Any, most: int) -> list[ScoreRequest]:
    """The validated requests; InvalidInput names each wrong field by JSON pointer."""
    listed = isinstance(values, list)
    if listed and not 1 <= len(values) <= most:
        raise InvalidInput(f"a list has 1 to {most} texts, got {len(values)}")
    try:
        bodies = _BODIES.validate_python(tuple(values) if listed else (values,))
    except ValidationError as error:
        raise invalid_input(error, skip=not listed) from None
    return [body.to_request() for body in bodies]


async def _unless_gone(request: Request, work: Awaitable[list[StepScores]]) -> list[StepScores]:
    """The result of the work, which is cancelled when the client goes: raises ClientDisconnect."""
    scoring = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait({scoring, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not scoring.done():
            raise ClientDisconnect
        if scoring.cancelled():
            raise CapacityError("this worker is draining", code="not-ready", retry_after_s=5.0)
        return scoring.result()
    finally:
        scoring.cancel()
        leaving.cancel()
        await asyncio.gather(scoring, leaving, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
