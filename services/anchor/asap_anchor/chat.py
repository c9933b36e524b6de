"""The port `ChatModel` over any OpenAI-compatible server, with the one transport retry policy.

Knows HTTP, money and waiting, not prompts, nor what makes a reply good: an empty or truncated reply
is returned as it came. The SDK's errors quote the server's body, which may quote prompt and key, so
ours are raised outside its `except` blocks and carry no trace of them.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

import openai
from pydantic import BaseModel, Field, ValidationError
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    wait_random_exponential,
)

from asap.errors import Misconfigured, UpstreamError
from asap.ports import ChatResult, Sampling
from asap.types import Usage
from asap_anchor.cache import ReplyCache, reply_key
from asap_anchor.failures import Failures, Transient

__all__ = ["OPENAI_URL", "ChatStats", "OpenAIChat"]

OPENAI_URL = "https://api.openai.com/v1"
_CONNECT_S = 10.0
"""A server that does not accept a connection by then is down; a reply may take minutes."""


@dataclass(slots=True)
class ChatStats:
    """What one client did so far."""

    calls: int = 0
    """Replies asked of the server; a retry is not a new call."""
    cached: int = 0
    """Replies that came from the cache."""
    retries: int = 0
    waited_s: float = 0.0
    """Backoff before retries, summed over concurrent calls."""


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Tokens(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Reply(BaseModel):
    """What we need of a chat completion. The SDK builds its own types without checking them."""

    choices: list[_Choice] = Field(min_length=1)
    usage: _Tokens | None = None


class OpenAIChat:
    """A chat model behind an OpenAI-compatible endpoint; safe for any number of concurrent calls.

    `timeout_s` bounds one request from connect to the last byte, so a reply that trickles ends too.
    `max_transport` retries follow transport failures, after a random wait of up to
    `backoff_base_s` * 2^n or as long as the server asks, at most `backoff_cap_s`.
    `price_in` and `price_out` are USD per million tokens; both are needed for a cost.
    No `base_url` is OpenAI's own. A server without keys takes any `api_key`.
    """

    def __init__(
        self,
        *,
        base_url: str | None,
        api_key: str,
        model: str,
        timeout_s: float = 600.0,
        concurrency: int = 32,
        max_transport: int = 6,
        backoff_base_s: float = 2.0,
        backoff_cap_s: float = 120.0,
        price_in: float | None = None,
        price_out: float | None = None,
        cache: ReplyCache | None = None,
    ) -> None:
        base_url = base_url or OPENAI_URL
        host = _host(base_url)
        self.stats = ChatStats()
        self._model = model
        self._timeout_s = timeout_s
        self._slots = asyncio.Semaphore(concurrency)
        self._max_transport = max_transport
        self._failures = Failures(host, model, max_transport)
        self._backoff_base_s = backoff_base_s
        self._backoff_cap_s = backoff_cap_s
        self._price_in = price_in
        self._price_out = price_out
        self._cache = cache
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._takes_schema = True
        self._client = openai.AsyncOpenAI(
            base_url=base_url,
            api_key=_header_safe(api_key),
            timeout=openai.Timeout(timeout_s, connect=min(_CONNECT_S, timeout_s)),
            max_retries=0,
        )

    @property
    def name(self) -> str:
        """The model's name, as the server knows it."""
        return self._model

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def complete(self, prompt: str, sampling: Sampling) -> ChatResult:
        """One reply to one user message, from the cache when it was asked before.

        Raises UpstreamTimeout or UpstreamUnavailable when no retry is left (context `retry_after_s`
        when the server named a time), UpstreamError when a retry cannot help.
        """
        if self._cache is None:
            return await self._ask(prompt, sampling)
        key = reply_key(self._model, prompt, sampling)
        # Equal questions of one run wait for one reply: it is paid once, and the next run, which
        # reads the cache, sees what this run saw.
        lock = self._locks.setdefault(key, asyncio.Lock())
        async with lock:
            kept = await asyncio.to_thread(self._cache.get, key)
            if kept is not None:
                self.stats.cached += 1
                return kept
            result = await self._ask(prompt, sampling)
            await asyncio.to_thread(self._cache.put, key, result)
            return result

    async def _ask(self, prompt: str, sampling: Sampling) -> ChatResult:
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self._max_transport + 1),
            wait=self._backoff_s,
            sleep=self._sleep,
            retry=retry_if_exception_type(Transient),
            reraise=True,
        )
        # Waiting keeps the slot: a server that asks for less load gets less.
        async with self._slots:
            self.stats.calls += 1
            try:
                return await retrying(self._send, prompt, sampling)
            except Transient as failure:
                error = failure.error
        raise error

    def _backoff_s(self, state: RetryCallState) -> float:
        failure = state.outcome.exception() if state.outcome else None
        asked = failure.retry_after_s if isinstance(failure, Transient) else None
        if asked is None:
            full_jitter = wait_random_exponential(self._backoff_base_s, max=self._backoff_cap_s)
            return full_jitter(state)
        # Never earlier than asked; spread, because concurrent calls are all told the same time.
        return min(asked, self._backoff_cap_s) + random.uniform(0, self._backoff_base_s)

    async def _sleep(self, seconds: float) -> None:
        self.stats.retries += 1
        self.stats.waited_s += seconds
        await asyncio.sleep(seconds)

    async def _send(self, prompt: str, sampling: Sampling) -> ChatResult:
        if sampling.json_schema is None or not self._takes_schema:
            return await self._post(prompt, sampling, structured=False)
        try:
            return await self._post(prompt, sampling, structured=True)
        except UpstreamError as error:
            if error.context.get("status") not in (400, 422):
                raise
        result = await self._post(prompt, sampling, structured=False)
        # Only now is it known that the schema was at fault, and not, say, a prompt too long.
        self._takes_schema = False
        return result

    async def _post(self, prompt: str, sampling: Sampling, *, structured: bool) -> ChatResult:
        failure: Exception
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._client.chat.completions.with_raw_response.create(
                    model=self._model,
                    messages=[{"role": "user", "content": prompt}],
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    max_tokens=sampling.max_tokens,
                    seed=sampling.seed,
                    response_format={
                        "type": "json_schema",
                        "json_schema": {
                            "name": "kept_steps",
                            "strict": True,
                            "schema": sampling.json_schema or {},
                        },
                    }
                    if structured
                    else openai.omit,
                )
        except (TimeoutError, openai.APITimeoutError):
            failure = self._failures.timed_out(self._timeout_s)
        except openai.APIConnectionError:
            failure = self._failures.unreachable()
        except openai.APIStatusError as error:
            failure = self._failures.refused(error.status_code, error.response.headers)
        else:
            return self._read(response.content)
        raise failure

    def _read(self, body: bytes) -> ChatResult:
        try:
            reply = _Reply.model_validate_json(body)
        except ValidationError:
            reply = None
        if reply is None:
            raise self._failures.malformed()
        choice = reply.choices[0]
        return ChatResult(
            text=choice.message.content or "",
            finish_reason=choice.finish_reason or "unknown",
            usage=self._priced(reply.usage),
        )

    def _priced(self, tokens: _Tokens | None) -> Usage:
        if tokens is None:
            return Usage(calls=1)
        cost_usd = None
        if self._price_in is not None and self._price_out is not None:
            paid = (
                tokens.prompt_tokens * self._price_in + tokens.completion_tokens * self._price_out
            )
            cost_usd = paid / 1e6
        return Usage(
            calls=1,
            prompt_tokens=tokens.prompt_tokens,
            completion_tokens=tokens.completion_tokens,
            cost_usd=cost_usd,
        )


def _host(base_url: str) -> str:
    """Host and port for messages, without a password that the URL may hold."""
    try:
        address = urlsplit(base_url)
        works = address.scheme in ("http", "https") and address.hostname and address.port != 0
    except ValueError:  # half an IPv6 address, a port beyond 65535
        works = False
    if not works:
        raise Misconfigured(
            "The LLM's base URL must look like http://host:8000/v1 or https://host/v1."
        )
    return address.netloc.rpartition("@")[2]


def _header_safe(api_key: str) -> str:
    """The key without the newline that files end in. Refuses what HTTP could not carry.

    The HTTP library would refuse it too, with the key in its message.
    """
    key = api_key.strip()
    if not key or not (key.isascii() and key.isprintable()):
        raise Misconfigured("The LLM's API key must be one line of printable ASCII characters.")
    return key
