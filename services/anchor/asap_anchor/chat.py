"""The port `ChatModel` over any OpenAI-compatible server, with the one transport retry policy.

Knows waiting and money, not prompts, nor what makes a reply good: an empty or truncated reply is
returned as it came.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from weakref import WeakValueDictionary

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    wait_random_exponential,
)

from asap.errors import UpstreamError, UpstreamUnavailable
from asap.estimate import Prices
from asap.ports import ChatResult, Sampling
from asap.windows import rough_tokens
from asap_anchor.cache import ReplyCache, reply_key
from asap_anchor.failures import Failures, Transient, concerns
from asap_anchor.hedge import first_answer
from asap_anchor.limits import AdaptiveLimit, Breaker, Pace, Slots
from asap_anchor.transport import OPENAI_URL, Transport, host_of
from asap_anchor.wire import Dialect, Refusal, chat_body, read_reply
from asap_runtime.spending import spend

__all__ = ["OPENAI_URL", "ChatStats", "Measure", "OpenAIChat"]

Measure = Callable[[str, Awaitable[ChatResult]], Awaitable[ChatResult]]
"""Awaits one request to the model of that name; sees its result or failure."""


@dataclass(slots=True)
class ChatStats:
    """What one client did so far."""

    calls: int = 0
    """Replies asked of the server; a retry is not a new call."""
    cached: int = 0
    """Replies that came from the cache."""
    hedged: int = 0
    """Requests that were sent beside a slow one."""
    retries: int = 0
    waited_s: float = 0.0
    """Backoff before retries, summed over concurrent calls."""


class OpenAIChat:
    """A chat model behind an OpenAI-compatible endpoint; safe for any number of concurrent calls.

    At most `concurrency` calls are under way, fewer while the server refuses or slows down, and no
    more than the given requests and tokens per minute. `timeout_s` bounds one request.
    `max_transport` retries follow transport failures, after a random wait of up to
    `backoff_base_s` * 2^n or as long as the server asks, at most `backoff_cap_s`.
    A request that takes longer than `hedge_after_s` is sent a second time, when a slot is free and
    rates allow it, and the first answer wins; the server may bill both.
    A call that would wait longer than `patience_s` for a slot or for its turn is refused, with
    `waits` in the error's context; without it calls wait as long as that takes.
    With a `breaker` no call is tried while it is open. `price_in`, `price_out` and `price_cached`
    are USD per million tokens; the first two are needed for a cost.
    No `base_url` is OpenAI's own. A server without keys takes any `api_key`. `measure` is put
    around every request, also around those that are tried again.
    """

    def __init__(
        self,
        *,
        base_url: str | None,
        api_key: str,
        model: str,
        timeout_s: float = 600.0,
        concurrency: int = 32,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        hedge_after_s: float | None = None,
        patience_s: float | None = None,
        max_transport: int = 6,
        backoff_base_s: float = 2.0,
        backoff_cap_s: float = 120.0,
        price_in: float | None = None,
        price_out: float | None = None,
        price_cached: float | None = None,
        cache: ReplyCache | None = None,
        measure: Measure | None = None,
        breaker: Breaker | None = None,
    ) -> None:
        self.stats = ChatStats()
        self._model = model
        self._failures = Failures(host_of(base_url), model, max_transport)
        self._transport = Transport(base_url, api_key, timeout_s=timeout_s, failures=self._failures)
        self._limit = AdaptiveLimit(concurrency)
        self._slots = Slots(self._limit)
        self._requests, self._tokens = Pace(requests_per_minute), Pace(tokens_per_minute)
        self._hedge_after_s = hedge_after_s
        self._patience_s = patience_s
        self._breaker = breaker
        self._max_transport = max_transport
        self._backoff_base_s = backoff_base_s
        self._backoff_cap_s = backoff_cap_s
        self._prices = None
        if price_in is not None and price_out is not None:
            self._prices = Prices(price_in, price_out, price_cached)
        self._cache = cache
        self._measure = measure
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._dialect = Dialect()

    @property
    def name(self) -> str:
        """The model's name, as the server knows it."""
        return self._model

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.close()

    async def complete(self, prompt: str, sampling: Sampling) -> ChatResult:
        """One reply to one user message, from the cache when it was asked before.

        Raises UpstreamTimeout or UpstreamUnavailable when no retry is left (context `retry_after_s`
        when the server named a time), UpstreamError when a retry cannot help. An error with `waits`
        in its context asks for the call later.
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
            retry=retry_if_exception(self._waits_here),
            reraise=True,
        )
        # Waiting keeps the slot: a server that asks for less load gets less.
        async with self._slot():
            self.stats.calls += 1
            try:
                return await retrying(self._send, prompt, sampling)
            except Transient as failure:
                error = failure.error
        raise error

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        """A slot, for those who get one in time."""
        async with AsyncExitStack() as held:
            try:
                async with asyncio.timeout(self._patience_s):
                    await held.enter_async_context(self._slots)
            except TimeoutError:
                raise self._failures.busy(self._patience_s or 0.0) from None
            yield

    def _waits_here(self, failure: BaseException) -> bool:
        """Whether another try follows. Where patience is short, a server that names a time far away
        is asked then, by another call.
        """
        if not isinstance(failure, Transient):
            return False
        is_far = (failure.retry_after_s or 0.0) > self._backoff_cap_s
        return self._patience_s is None or not (is_far and failure.error.context.get("waits"))

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
        """One request, and again in plainer words while the server does not understand it."""
        dialect = known = self._dialect
        while True:
            try:
                result = await self._post(prompt, sampling, dialect)
            except UpstreamError as error:
                plainer = None
                if error.context.get("status") in (400, 422):
                    structured = sampling.json_schema is not None
                    refused = error.context.get("param")
                    plainer = dialect.plainer(refused, structured=structured)
                if plainer is None:
                    raise
                dialect = plainer
            else:
                if dialect is not known:
                    # Only now is it known that the words were at fault, not, say, a long prompt.
                    self._dialect = dialect
                return result

    async def _post(self, prompt: str, sampling: Sampling, dialect: Dialect) -> ChatResult:
        """One request in its turn, and a second one beside it where it is slow."""
        await self._wait_for_turn(rough_tokens(prompt))
        first = self._exchange(prompt, sampling, dialect)
        if self._hedge_after_s is None:
            return await first
        return await first_answer(
            first, lambda: self._post_again(prompt, sampling, dialect), self._hedge_after_s
        )

    async def _post_again(self, prompt: str, sampling: Sampling, dialect: Dialect) -> ChatResult:
        async with self._slots:
            await self._wait_for_turn(rough_tokens(prompt))
            self.stats.hedged += 1
            return await self._exchange(prompt, sampling, dialect)

    async def _exchange(self, prompt: str, sampling: Sampling, dialect: Dialect) -> ChatResult:
        """One request and what it says of the server: to limit, rates and breaker."""
        probe, began = self._enter(), time.monotonic()
        request = self._request(prompt, sampling, dialect)
        try:
            result = await (self._measure(self._model, request) if self._measure else request)
        except asyncio.CancelledError:
            if self._breaker is not None:
                self._breaker.cancelled(probe=probe)
            raise
        except Transient as failure:
            self._failed(failure.error, began, probe=probe, retry_after_s=failure.retry_after_s)
            raise
        except UpstreamError as error:
            self._failed(error, began, probe=probe)
            raise
        kind = (sampling.temperature, sampling.json_schema is not None)
        self._limit.answered(kind, began=began, now=time.monotonic())
        used = result.usage.prompt_tokens + result.usage.completion_tokens
        self._tokens.correct(used - rough_tokens(prompt))
        if self._breaker is not None:
            self._breaker.end(None, time.monotonic(), probe=probe)
        return result

    async def _wait_for_turn(self, tokens: int) -> None:
        now = time.monotonic()
        seconds = max(self._requests.reserve(1, now), self._tokens.reserve(tokens, now))
        try:
            if self._patience_s is not None and seconds > self._patience_s:
                raise self._failures.busy(seconds)
            await asyncio.sleep(seconds)
        except (asyncio.CancelledError, UpstreamUnavailable):
            self._requests.correct(-1)  # the turn is for whoever comes next
            self._tokens.correct(-tokens)
            raise

    def _enter(self) -> bool:
        """Whether the request that starts now is the breaker's probe."""
        if self._breaker is None:
            return False
        if seconds := self._breaker.wait_s(time.monotonic()):
            raise self._failures.resting(seconds, self._breaker.reason)
        return self._breaker.begin()

    def _failed(
        self, error: UpstreamError, began: float, *, probe: bool, retry_after_s: float | None = None
    ) -> None:
        """What a failure says of the server, for all calls that follow."""
        now, whose = time.monotonic(), concerns(error)
        if error.context.get("status") in (429, 503) and whose != "account":
            self._limit.refused(began=began, now=now)
            if retry_after_s is not None:
                self._requests.pause(now + min(retry_after_s, self._backoff_cap_s))
        if self._breaker is None:
            return
        if whose == "account":
            self._breaker.trip(error.detail, now)
        else:
            self._breaker.end(error.detail if whose == "server" else None, now, probe=probe)

    async def _request(self, prompt: str, sampling: Sampling, dialect: Dialect) -> ChatResult:
        body = chat_body(self._model, prompt, sampling, dialect)
        answer = await self._transport.post("/chat/completions", body)
        if answer.status != 200:
            raise self._failures.refused(answer.status, answer.headers, Refusal.read(answer.body))
        result = read_reply(answer.body, self._prices)
        if result is None:
            raise self._failures.malformed()
        spend(result.usage.cost_usd or 0.0)
        return result
