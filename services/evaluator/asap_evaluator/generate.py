"""Completions of one served model by vLLM's `/v1/completions`: token ids sent, text, ids and times
streamed back.

Errors carry the server's status alone: its bodies may quote the prompt.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import httpx
from pydantic import BaseModel, Field, ValidationError

from asap.chat_templates import template_for
from asap.errors import (
    AsapError,
    CapacityError,
    InvalidInput,
    Misconfigured,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from asap.eval_config import EvalConfig
from asap.problems import Sample
from asap.train_config import TemplateName
from asap_evaluator.tokens import ModelTokens
from asap_runtime.telemetry import GENERATE_REQUESTS, GENERATE_SECONDS, GENERATE_TOKENS

__all__ = ["Generator"]

CONNECT_S, SHORT_S = 10.0, 60.0
PAUSES_S = (1.0, 3.0)
"""Before the second and the third try of a request whose connection failed."""
RETRY_S = 10.0
STREAM_TOKENS = 16
"""Of one streamed piece after the first; a server that knows no such option sends more of them."""


class _Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int


class _Choice(BaseModel):
    text: str = ""
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class _Piece(BaseModel):
    choices: list[_Choice] = Field(max_length=1)
    usage: _Usage | None = None


class _Model(BaseModel):
    id: str
    max_model_len: int | None = None


class _Models(BaseModel):
    data: list[_Model]


class _Version(BaseModel):
    version: str = Field(max_length=100)


class _Tokenized(BaseModel):
    tokens: list[int]


_Reply = TypeVar("_Reply", bound=BaseModel)


class _Lost(Exception):
    """The connection ended before the completion did."""


class _Unreached(_Lost):
    """There was none."""


@dataclass(slots=True)
class _Completion:
    """What has come so far."""

    texts: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    has_ids: bool = True
    finish_reason: str | None = None
    usage: _Usage | None = None
    ttft_s: float | None = None

    def take(self, piece: _Piece, seconds: float) -> None:
        for choice in piece.choices:
            if self.ttft_s is None and (choice.text or choice.token_ids):
                self.ttft_s = seconds
            self.texts.append(choice.text)
            self.has_ids = self.has_ids and choice.token_ids is not None
            self.ids += choice.token_ids or ()
            self.finish_reason = choice.finish_reason or self.finish_reason
        self.usage = piece.usage or self.usage


class Generator:
    """Asks one model; safe for any number of concurrent calls, of which `concurrency` run.

    Args:
        url: gives the server's address without a path; it may change when the server restarts.
        model: what the server calls the model.
        tokens: the model's tokenizer.
        api_key: sent as a bearer token, if the server wants one.
        concurrency: requests at the same time.
        timeout_s: bound on one completion.
        facts: of the server, for the report; its version and what is asked of it are added.
    """

    def __init__(
        self,
        url: Callable[[], str],
        model: str,
        tokens: ModelTokens,
        *,
        api_key: str | None = None,
        concurrency: int = 64,
        timeout_s: float = 1500.0,
        facts: Mapping[str, str] | None = None,
    ) -> None:
        self._url, self._model, self._tokens = url, model, tokens
        self._slots = asyncio.Semaphore(concurrency)
        self._timeout_s = timeout_s
        self._window: int | None = None
        self._facts = {**(facts or {}), "requests_at_once": str(concurrency)}
        self._client = httpx.AsyncClient(
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key.strip()}"},
            # Between two pieces of a loaded server minutes may pass; the whole is bounded.
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=None),
        )

    async def connect(self) -> None:
        """Ask for the model's window, and generate one token: what the first request would wait
        for is then done. Raises Misconfigured when the server has no such model.
        """
        served = _read(_Models, await self._ask("GET", "/v1/models", None)).data
        found = next((one for one in served if one.id == self._model), None)
        if found is None:
            raise Misconfigured("the server serves no model of this name; check served_model")
        self._window = found.max_model_len
        self._facts["window"] = str(self._window)
        with suppress(AsapError):  # only vLLM has such an address
            version = _read(_Version, await self._ask("GET", "/version", None))
            self._facts["vllm"] = version.version
        body = {"model": self._model, "prompt": "\n", "max_tokens": 1}
        await self._ask("POST", "/v1/completions", body)

    @property
    def facts(self) -> dict[str, str]:
        """Of the server and of what is asked of it, for the report."""
        return dict(self._facts)

    async def prompt(
        self, question: str, template: TemplateName | Literal["server"]
    ) -> tuple[int, ...]:
        """The ids to send for a question: by one of our templates, or the server's own.

        Raises Misconfigured (`unknown-chat-form`) when tokenizer or server has no such form,
        InvalidInput when the question brings a second BOS.
        """
        if template == "server":
            ids = await self._server_prompt(question)
            # Once more, that is; some families use BOS as a mark of every turn.
            doubled = ids[:2] == (self._tokens.bos_id,) * 2
        else:
            chosen = template_for(template, self._tokens)
            ids = self._tokens.encode(chosen.prompt(question)).ids
            doubled = bool(chosen.bos) and ids.count(self._tokens.token_id(chosen.bos)) != 1
        if doubled:
            raise InvalidInput("the prompt does not have exactly one BOS token")
        return ids

    async def sample(
        self,
        prompt: tuple[int, ...],
        config: EvalConfig,
        *,
        task_id: str,
        budget: int,
        number: int,
    ) -> Sample:
        """One completion of at most `budget` tokens.

        Only a lost connection is tried again here. Raises InvalidInput when prompt and budget
        exceed the model's window, CapacityError (`not-ready`) when the server cannot be reached,
        UpstreamTimeout, UpstreamUnavailable, UpstreamError.
        """
        if self._window is not None and len(prompt) + budget > self._window:
            raise InvalidInput(
                f"{len(prompt)} tokens of prompt and {budget} of budget do not fit into the "
                f"server's window of {self._window}; serve with a longer max_model_len",
                code="text-too-long",
            )
        body = {
            "model": self._model,
            "prompt": list(prompt),
            "max_tokens": budget,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "seed": config.seed + number,
            # What the model's files may set otherwise, and the protocol does not know.
            **{"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
            "stop_token_ids": list(self._tokens.stop_ids),
            "skip_special_tokens": False,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "stream_interval": STREAM_TOKENS,
        }
        async with self._slots:
            started_at, began, found = await self._tried(body)
            seconds = time.perf_counter() - began
        usage = found.usage
        if usage is None or found.finish_reason is None or usage.completion_tokens > budget:
            raise UpstreamError("the server's answer is not that of a completion")
        reasoning = None
        if found.has_ids and len(found.ids) == usage.completion_tokens:
            reasoning = await asyncio.to_thread(self._tokens.reasoning_tokens, found.ids)
        GENERATE_TOKENS.labels("prompt").inc(usage.prompt_tokens)
        GENERATE_TOKENS.labels("completion").inc(usage.completion_tokens)
        GENERATE_SECONDS.labels("first").observe(found.ttft_s or seconds)
        GENERATE_SECONDS.labels("whole").observe(seconds)
        return Sample(
            task_id=task_id,
            number=number,
            budget=budget,
            text="".join(found.texts),
            completion_tokens=usage.completion_tokens,
            reasoning_tokens=reasoning,
            prompt_tokens=usage.prompt_tokens,
            finish_reason=found.finish_reason,
            started_at=started_at,
            seconds=seconds,
            ttft_s=found.ttft_s,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _tried(self, body: Mapping[str, Any]) -> tuple[float, float, _Completion]:
        """Epoch and clock at the start of the try that came through, and the completion."""
        for pause_s in (*PAUSES_S, None):
            started_at, began, outcome = time.time(), time.perf_counter(), "cancelled"
            try:
                async with asyncio.timeout(self._timeout_s):
                    found = await self._stream(body, began)
                outcome = "ok"
                return started_at, began, found
            except _Lost as lost:
                outcome = "unreached" if isinstance(lost, _Unreached) else "lost"
            except UpstreamError as error:
                outcome = error.problem_code
                raise
            except TimeoutError:
                outcome = "upstream-timeout"
                break
            finally:
                GENERATE_REQUESTS.labels(outcome).inc()
            if pause_s is None and outcome == "unreached":
                raise _unreached()
            if pause_s is None:
                raise UpstreamUnavailable("the connection to the server is lost")
            await asyncio.sleep(pause_s)
        raise UpstreamTimeout(f"no whole completion within {self._timeout_s:g} s")

    async def _stream(self, body: Mapping[str, Any], began: float) -> _Completion:
        found = _Completion()
        try:
            # Leaving the block early, as on cancellation, closes the connection: vLLM then stops.
            async with self._client.stream(
                "POST", f"{self._url()}/v1/completions", json=body
            ) as response:
                _check(response.status_code)
                async for line in response.aiter_lines():
                    data = line.removeprefix("data:").strip()
                    if data == "[DONE]":
                        break
                    if data:
                        found.take(_read(_Piece, data), time.perf_counter() - began)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise _Unreached from None
        except httpx.TimeoutException:
            raise TimeoutError from None
        except httpx.HTTPError:
            raise _Lost from None
        if found.finish_reason is None:
            raise _Lost
        return found

    async def _server_prompt(self, question: str) -> tuple[int, ...]:
        message = {"role": "user", "content": question}
        body = {"model": self._model, "messages": [message], "add_generation_prompt": True}
        try:
            return tuple(_read(_Tokenized, await self._ask("POST", "/tokenize", body)).tokens)
        except UpstreamError as error:
            if error.retryable:
                raise
        raise Misconfigured(
            "the server has no chat template for this model; name one of ours with `template`",
            code="unknown-chat-form",
        )

    async def _ask(self, method: str, path: str, body: object) -> bytes:
        """A short request, without second tries."""
        try:
            response = await self._client.request(
                method, f"{self._url()}{path}", json=body, timeout=SHORT_S
            )
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise _unreached() from None
        except httpx.TimeoutException:
            raise UpstreamTimeout(f"the server gave no answer within {SHORT_S:g} s") from None
        except httpx.HTTPError:
            raise UpstreamUnavailable("the connection to the server is lost") from None
        _check(response.status_code)
        return response.content


def _unreached() -> CapacityError:
    """No fault of the item's: it was never sent."""
    return CapacityError("the server cannot be reached", code="not-ready", retry_after_s=RETRY_S)


def _check(status: int) -> None:
    if status != httpx.codes.OK:
        kind = UpstreamUnavailable if status == 429 or status >= 500 else UpstreamError
        raise kind(f"the server answered with status {status}", status=status)


def _read(kind: type[_Reply], content: bytes | str) -> _Reply:
    try:
        return kind.model_validate_json(content)
    except ValidationError:
        pass
    # Among others the error that vLLM streams when its engine dies.
    raise UpstreamUnavailable("the server's answer is not one of vLLM's")
