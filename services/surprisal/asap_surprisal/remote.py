"""`RemoteScorer`: the same scores from a running vLLM server, by its `prompt_logprobs`.

The tokenizer is at hand, so token ids are sent and positions are known without asking. The server
tells the probability of the token that stands there, not the distribution: entropies need the torch
scorer. Bodies of the server may quote the text, so errors carry its status alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel, Field, ValidationError

from asap.config import ScoreName
from asap.errors import (
    InvalidInput,
    Misconfigured,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from asap.ports import ScoreRequest
from asap.types import StepScores
from asap_surprisal.preparation import Prepared, Values, prepare, step_scores
from asap_surprisal.sequence import Row
from asap_surprisal.tokenization import HFTokenCounter

__all__ = ["RemoteScorer"]

_CONNECT_S = 10.0
_LATER = (429, 502, 503, 504)
"""What a server answers that is full, starts, or is away behind its proxy: no text is at fault."""
_UNKNOWN = float("nan")
"""Stands for an entropy, which is never read."""


class _LogProb(BaseModel):
    logprob: float | None = None


class _Choice(BaseModel):
    prompt_logprobs: list[dict[int, _LogProb] | None]


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1, max_length=1)


class _Model(BaseModel):
    id: str
    max_model_len: int | None = None


class _Models(BaseModel):
    data: list[_Model]


_Reply = TypeVar("_Reply", bound=BaseModel)


class RemoteScorer:
    """The port `asap.ports.Scorer` over HTTP; safe for any number of concurrent calls.

    The server batches, so requests go out one by one, at most `concurrency` at a time.

    Args:
        base_url: such as http://host:8000/v1.
        model: what the server calls the model.
        counter: the tokenizer of that model.
        window: the longest prompt that the server takes, in tokens.
        timeout_s: bound on one request from connect to the last byte.
    """

    offers: frozenset[ScoreName] = frozenset({"first_token_surprisal", "mean_surprisal"})
    """The scores that it can give."""

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        counter: HFTokenCounter,
        window: int,
        api_key: str | None = None,
        concurrency: int = 32,
        timeout_s: float = 600.0,
    ) -> None:
        self._model, self._counter, self._timeout_s = model, counter, timeout_s
        self.window = window
        """Longest input in tokens, BOS included."""
        self._slots = asyncio.Semaphore(concurrency)
        try:
            self._client = httpx.AsyncClient(
                base_url=base_url.rstrip("/") + "/",
                headers={} if api_key is None else {"Authorization": f"Bearer {api_key.strip()}"},
                timeout=httpx.Timeout(timeout_s, connect=min(_CONNECT_S, timeout_s)),
                limits=httpx.Limits(max_connections=concurrency),
            )
        except (ValueError, httpx.InvalidURL):
            usable = False
        else:
            usable = self._client.base_url.scheme in ("http", "https")
        if not usable:
            raise Misconfigured(
                "the scoring server's base URL must look like http://host:8000/v1, and its key "
                "must be plain ASCII"
            )

    @classmethod
    async def connect(
        cls,
        *,
        base_url: str,
        model: str,
        tokenizer: str,
        api_key: str | None = None,
        concurrency: int = 32,
        timeout_s: float = 600.0,
    ) -> Self:
        """A scorer whose window is what the server says.

        Args:
            base_url: such as http://host:8000/v1.
            model: what the server calls the model.
            tokenizer: hub name or directory that the server loaded the model from.
            api_key: sent as a bearer token, if the server wants one.
            concurrency: requests at the same time.
            timeout_s: bound on one request.

        Raises:
            Misconfigured: bad URL or tokenizer, or the server serves no such model.
            UpstreamError: the server cannot be asked, or is not vLLM.
        """
        counter = await asyncio.to_thread(HFTokenCounter.load, tokenizer)
        scorer = cls(
            base_url=base_url,
            model=model,
            counter=counter,
            window=2**31,
            api_key=api_key,
            concurrency=concurrency,
            timeout_s=timeout_s,
        )
        try:
            scorer.window = min(scorer.window, await scorer._longest_prompt())
        except BaseException:
            await scorer.close()
            raise
        return scorer

    @property
    def name(self) -> str:
        """The model as the server names it."""
        return self._model

    @property
    def tokenizer_name(self) -> str:
        """What the tokenizer was loaded from."""
        return self._counter.tokenizer_name

    def count(self, text: str) -> int:
        """Number of ids of `text`, special tokens not included."""
        return self._counter.count(text)

    def prepare(self, request: ScoreRequest) -> Prepared:
        """The request tokenised, in any thread. Raises InvalidInput when it asks for entropies."""
        if asked := [name for name in request.scores if name not in self.offers]:
            raise InvalidInput(
                f"a vLLM server tells no {asked[0]}: score by first_token_surprisal or "
                "mean_surprisal, or use the torch scorer"
            )
        return prepare(request, self._counter, self.window)

    async def score(self, requests: Sequence[ScoreRequest]) -> list[StepScores]:
        """Scores for each request, in order.

        Raises InvalidInput when one asks for entropies, UpstreamTimeout, UpstreamUnavailable or
        UpstreamError when the server fails; `waits` in the context asks for the call later.
        """
        ready = [await asyncio.to_thread(self.prepare, request) for request in requests]
        return await self.score_prepared(ready)

    async def score_prepared(self, prepared: Sequence[Prepared]) -> list[StepScores]:
        """Scores for each request that `prepare` made ready, in order."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    [group.create_task(self._score_row(row)) for row in ready.plan.rows]
                    for ready in prepared
                ]
        except BaseExceptionGroup as group_error:
            failure = group_error.exceptions[0]
        else:
            return [
                step_scores(ready, {k: v for task in row_tasks for k, v in task.result().items()})
                for ready, row_tasks in zip(prepared, tasks, strict=True)
            ]
        raise failure

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _score_row(self, row: Row) -> Values:
        ids = [*row.ids, row.targets[-1]]  # a row ends before its last target
        body = {
            "model": self._model,
            "prompt": ids,
            "prompt_logprobs": 0,  # that of the prompt's own tokens; 1 would add the likeliest
            "max_tokens": 1,
            "temperature": 0.0,
        }
        async with self._slots:
            content = await self._send("POST", "completions", body)
        found = _parse(_Completion, content).choices[0].prompt_logprobs
        if len(found) != len(ids):
            raise UpstreamError("the scoring server's answer does not fit the prompt")
        values: dict[int, tuple[float, float]] = {}
        for position, target, token in zip(row.positions, row.targets, row.tokens, strict=True):
            known = (found[position + 1] or {}).get(target)
            if known is None:
                raise UpstreamError("the scoring server's answer lacks a token of the prompt")
            values[token] = (_UNKNOWN if known.logprob is None else -known.logprob, _UNKNOWN)
        return values

    async def _longest_prompt(self) -> int:
        served = _parse(_Models, await self._send("GET", "models")).data
        limit = next((one.max_model_len for one in served if one.id == self._model), None)
        if limit is None:
            raise Misconfigured(
                f"the scoring server serves no model {self._model!r} with a known length; "
                "check its --served-model-name",
                model=self._model,
            )
        return limit - 1  # one token must be generated

    async def _send(self, method: str, path: str, body: object | None = None) -> bytes:
        failure: UpstreamError
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._client.request(method, path, json=body)
        except (TimeoutError, httpx.TimeoutException):
            failure = UpstreamTimeout(
                f"the scoring server gave no answer within {self._timeout_s:g} s"
            )
        except httpx.HTTPError:
            failure = UpstreamUnavailable("the scoring server cannot be reached", waits=True)
        else:
            status = response.status_code
            if status == httpx.codes.OK:
                return response.content
            kind = UpstreamUnavailable if status == 429 or status >= 500 else UpstreamError
            known: dict[str, Any] = {"waits": True} if status in _LATER else {}
            failure = kind(
                f"the scoring server answered with status {status}", status=status, **known
            )
        raise failure


def _parse(kind: type[_Reply], content: bytes) -> _Reply:
    try:
        return kind.model_validate_json(content)
    except ValidationError:
        pass
    raise UpstreamError("the scoring server's answer is not that of vLLM's prompt_logprobs")
