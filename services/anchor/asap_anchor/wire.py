"""The chat completions protocol as bytes and values: request bodies, replies, error bodies. No IO.

Nothing that a server sent gets into a sentence: what is read of an error is compared, never quoted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

from pydantic import BaseModel, Field, ValidationError

from asap.estimate import Prices
from asap.ports import ChatResult, Sampling
from asap.types import Usage

__all__ = ["Dialect", "Refusal", "chat_body", "read_reply"]


@dataclass(frozen=True, slots=True)
class Dialect:
    """What a server was found to accept."""

    schema: bool = True
    """Structured replies by JSON schema."""
    length: str = "max_tokens"
    """How it calls the bound of a reply; OpenAI's newer models refuse the older name."""

    def plainer(self, param: object, *, structured: bool) -> Dialect | None:
        """What to try when `param` was refused, or the whole request; None: nothing is left."""
        if param == "max_tokens" and self.length == "max_tokens":
            return replace(self, length="max_completion_tokens")
        return replace(self, schema=False) if structured and self.schema else None


class _Detail(BaseModel):
    code: str | int | None = None
    type: str | None = None
    param: str | None = None


class _ErrorBody(BaseModel):
    error: _Detail


@dataclass(frozen=True, slots=True)
class Refusal:
    """What an error body says in words that are the protocol's own."""

    code: str = ""
    param: str = ""

    @classmethod
    def read(cls, body: bytes) -> Self:
        """The code, or the type where there is none; empty for what cannot be read."""
        try:
            error = _ErrorBody.model_validate_json(body).error
        except ValidationError:
            return cls()
        return cls(code=str(error.code or error.type or ""), param=error.param or "")


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _PromptDetails(BaseModel):
    cached_tokens: int | None = None


class _Tokens(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None
    prompt_cache_hit_tokens: int | None = None
    """DeepSeek's word for the cached ones."""


class _Reply(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    usage: _Tokens | None = None


def chat_body(model: str, prompt: str, sampling: Sampling, dialect: Dialect) -> dict[str, Any]:
    """The JSON of one request: one user message and all decoding parameters."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        dialect.length: sampling.max_tokens,
        "seed": sampling.seed,
    }
    if sampling.json_schema is not None and dialect.schema:
        schema = {"name": "kept_steps", "strict": True, "schema": sampling.json_schema}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return body


def read_reply(body: bytes, prices: Prices | None, *, batch: bool = False) -> ChatResult | None:
    """The reply with its usage; its cost when there are prices. None: no chat completion."""
    try:
        reply = _Reply.model_validate_json(body)
    except ValidationError:
        return None
    choice = reply.choices[0]
    return ChatResult(
        text=choice.message.content or "",
        finish_reason=choice.finish_reason or "unknown",
        usage=_usage(reply.usage, prices, batch=batch),
    )


def _usage(tokens: _Tokens | None, prices: Prices | None, *, batch: bool) -> Usage:
    if tokens is None:
        return Usage(calls=1)
    sent, received = (max(0, n or 0) for n in (tokens.prompt_tokens, tokens.completion_tokens))
    details = tokens.prompt_tokens_details or _PromptDetails()
    cached = max(0, min(details.cached_tokens or tokens.prompt_cache_hit_tokens or 0, sent))
    return Usage(
        calls=1,
        prompt_tokens=sent,
        cached_tokens=cached,
        completion_tokens=received,
        cost_usd=prices and prices.usd(sent, received, cached=cached, batch=batch),
    )
