"""The port `ChatModel` over a provider's batches: half the price, replies within a day.

A call is collected, and refused with `waits` in the error's context until its reply is in the
cache. What is collected is sent as one file every so often. Open batches are kept on disk, so
neither a killed process nor another one on the same folder pays for a request twice.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from asap.errors import AsapError, UpstreamError
from asap.estimate import Prices
from asap.ports import ChatResult, Sampling
from asap_anchor.batch_ledger import BatchLedger, OpenBatch
from asap_anchor.cache import ReplyCache, reply_key
from asap_anchor.failures import Failures, Transient
from asap_anchor.transport import Answer, Transport, host_of
from asap_anchor.wire import Dialect, Refusal, chat_body, read_reply
from asap_runtime.logs import get_logger
from asap_runtime.spending import spend

__all__ = ["BatchChat"]

MAX_REQUESTS = 20_000
MAX_BYTES = 90 * 2**20
"""Of one file; providers take 50,000 requests and 100 to 200 MB."""
LONGEST_WAIT_S = 1800.0
_LISTED = 100
"""Batches looked through for one that may have been made just before the process ended."""
_LATER = ("token_limit_exceeded", "rate_limit_exceeded")
"""Why a whole batch may be refused that a later one is not."""

_PATH = "/chat/completions"


T = TypeVar("T", bound=BaseModel)


class _File(BaseModel):
    id: str


class _Trouble(BaseModel):
    code: str | None = None


class _Troubles(BaseModel):
    data: list[_Trouble] = []


class _Batch(BaseModel):
    id: str
    status: str
    input_file_id: str
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: _Troubles | None = None

    @property
    def ended(self) -> bool:
        return self.status in ("completed", "failed", "expired", "cancelled")


class _Batches(BaseModel):
    data: list[_Batch]


class _Response(BaseModel):
    status_code: int
    body: Any = None


class _Line(BaseModel):
    custom_id: str
    response: _Response | None = None


class BatchChat:
    """A chat model whose replies come with batches; `start` it, and `close` it.

    Every `period_s` what was collected is sent, and each open batch is asked for. `prices` are
    those of single calls. Replies are booked where they are taken, each once.
    """

    def __init__(
        self,
        *,
        base_url: str | None,
        api_key: str,
        model: str,
        cache: ReplyCache,
        folder: Path,
        timeout_s: float = 600.0,
        period_s: float = 60.0,
        prices: Prices | None = None,
    ) -> None:
        self._model = model
        self._failures = Failures(host_of(base_url), model, 0)
        self._transport = Transport(base_url, api_key, timeout_s=timeout_s, failures=self._failures)
        self._cache, self._ledger = cache, BatchLedger(folder)
        self._period_s, self._prices = period_s, prices
        self._most, self._fits = MAX_REQUESTS, 1
        self._dialect = Dialect()
        self._collected: dict[str, bytes] = {}
        self._pending: set[str] = set()
        self._refused: dict[str, UpstreamError] = {}
        self._turns: asyncio.Task[None] | None = None
        self._log = get_logger()

    @property
    def name(self) -> str:
        """The model's name, as the server knows it."""
        return self._model

    async def start(self) -> None:
        """Take up the open batches, and go on with them until `close`."""
        await self._look()
        self._turns = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stop, and close the connections. What was only collected is asked for again."""
        if self._turns is not None:
            self._turns.cancel()
            with suppress(asyncio.CancelledError):
                await self._turns
        await self._transport.close()

    async def complete(self, prompt: str, sampling: Sampling) -> ChatResult:
        """The reply, once it is there.

        Raises UpstreamUnavailable with `waits` and `retry_after_s` in its context until then,
        UpstreamError when the provider refused this request.
        """
        key = reply_key(self._model, prompt, sampling)
        kept = await asyncio.to_thread(self._take, key)
        if isinstance(kept, ChatResult):
            return kept
        if (refusal := self._refused.pop(key, None)) is not None:
            raise refusal
        if key not in self._pending and key not in self._collected:
            body = chat_body(self._model, prompt, sampling, self._dialect)
            line = {"custom_id": key, "method": "POST", "url": f"/v1{_PATH}", "body": body}
            self._collected[key] = json.dumps(line).encode()
        raise self._failures.in_batch(self._wait_s())

    async def turn(self) -> None:
        """Send what is collected, ask for each open batch, keep the replies of those that ended.

        Raises Transient or UpstreamError when that does not work now; nothing is lost by it.
        """
        trouble: Transient | UpstreamError | None = None
        for lines in self._files():
            try:
                await self._upload(lines)
            except (Transient, UpstreamError) as error:
                trouble = error
                self._refuse_for_good(lines, error)
        # What waits at the provider is fetched, whatever it says of new requests.
        for batch in await self._look():
            try:
                await self._go_on(batch)
            except (Transient, UpstreamError) as error:
                trouble = error
        await self._look()
        if trouble is not None:
            raise trouble

    async def _go_on(self, batch: OpenBatch) -> None:
        """Make the batch where it is not made, and finish it when it has ended."""
        if batch.batch is None:
            try:
                batch = await self._create(batch)
            except UpstreamError as error:
                if self._refuse_for_good(batch.keys, error):
                    await asyncio.to_thread(self._ledger.drop, batch)
                raise
        try:
            state = _parsed(_Batch, await self._get(f"/batches/{batch.batch}"), self._failures)
        except UpstreamError as error:
            if error.context.get("status") != 404:
                raise
            await asyncio.to_thread(self._ledger.drop, batch)  # the provider forgot it
            return
        if state.ended:
            await self._finish(batch, state)

    def _refuse_for_good(self, keys: Iterable[str], error: Transient | UpstreamError) -> bool:
        """Whether nothing can come of these calls, which then fail instead of waiting for ever."""
        if isinstance(error, Transient) or error.retryable:
            return False
        for key in keys:
            self._collected.pop(key, None)
            self._refused[key] = error
        return True

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._period_s)
            try:
                await self.turn()
            except Transient as failure:
                self._log.warning("batch.turn_failed", code=failure.error.problem_code)
            except AsapError as error:
                self._log.warning("batch.turn_failed", code=error.problem_code)
            except OSError:  # the turn after the next may find room again
                self._log.exception("batch.turn_failed", code="disk")

    def _wait_s(self) -> float:
        """Two turns and a half: by then every process on the folder knows of the batch. Longer
        when many items wait, or they would do nothing but ask.
        """
        waiting = len(self._pending) + len(self._collected)
        return min(LONGEST_WAIT_S, self._period_s * (2.5 + waiting / 1000))

    def _take(self, key: str) -> ChatResult | None:
        kept = self._cache.get(key)
        if kept is not None and self._ledger.book(key):
            spend(kept.usage.cost_usd or 0.0)
        return kept

    async def _look(self) -> list[OpenBatch]:
        batches = await asyncio.to_thread(self._ledger.batches)
        self._pending = {key for batch in batches for key in batch.keys}
        return batches

    def _files(self) -> Iterator[dict[str, bytes]]:
        """What is collected, in parts that a provider takes."""
        lines: dict[str, bytes] = {}
        size = 0
        for key, line in list(self._collected.items()):
            if lines and (len(lines) == self._most or size + len(line) > MAX_BYTES):
                yield lines
                lines, size = {}, 0
            lines[key] = line
            size += len(line) + 1
        if lines:
            yield lines

    async def _upload(self, lines: dict[str, bytes]) -> None:
        answer = await self._transport.upload(
            "/files", {"purpose": "batch"}, "requests.jsonl", b"\n".join(lines.values()) + b"\n"
        )
        file = _parsed(_File, self._checked(answer), self._failures)
        batch = OpenBatch(input_file=file.id, keys=tuple(lines))
        # From here on the requests are this batch's, whatever happens to the process.
        await asyncio.to_thread(self._ledger.put, batch)
        self._pending.update(lines)
        for key in lines:
            self._collected.pop(key, None)

    async def _create(self, batch: OpenBatch) -> OpenBatch:
        """The batch of an uploaded file: the one that exists already, else a new one."""
        listed = await self._get(f"/batches?limit={_LISTED}")
        made = _parsed(_Batches, listed, self._failures).data
        found = next((b for b in made if b.input_file_id == batch.input_file), None)
        if found is None:
            order = {"input_file_id": batch.input_file, "endpoint": f"/v1{_PATH}"}
            answer = await self._transport.post("/batches", {**order, "completion_window": "24h"})
            found = _parsed(_Batch, self._checked(answer), self._failures)
            self._log.info("batch.sent", requests=len(batch.keys))
        known = batch.model_copy(update={"batch": found.id})
        await asyncio.to_thread(self._ledger.put, known)
        return known

    async def _finish(self, batch: OpenBatch, state: _Batch) -> None:
        replies = 0
        for file in (state.output_file_id, state.error_file_id):
            if file is not None:
                body = await self._get(f"/files/{file}/content")
                replies += await asyncio.to_thread(self._keep, body, frozenset(batch.keys))
        codes = [trouble.code for trouble in state.errors.data] if state.errors else []
        await asyncio.to_thread(self._ledger.drop, batch)
        if state.status == "completed":
            self._fits = max(self._fits, len(batch.keys))
        elif state.status == "failed" and set(codes) & set(_LATER):
            # While others are with the provider there may only be too many of them.
            if not any(other.batch for other in await self._look()):
                self._most = max(self._fits, min(self._most, len(batch.keys)) // 2)
        elif state.status == "failed":
            for key in batch.keys:
                self._refused[key] = self._failures.batch_refused()
        self._log.info(
            "batch.ended", status=state.status, requests=len(batch.keys), replies=replies
        )

    def _keep(self, content: bytes, keys: frozenset[str]) -> int:
        """Put the replies into the cache; what failed is remembered, or asked for again."""
        replies = 0
        for raw in content.splitlines():
            try:
                line = _Line.model_validate_json(raw)
            except ValidationError:
                continue
            if line.custom_id not in keys or line.response is None:
                continue  # `batch_expired` among them: it is asked for again
            body = json.dumps(line.response.body).encode()
            if line.response.status_code == 200:
                replies += self._keep_reply(line.custom_id, body)
            else:
                self._note_refusal(line.custom_id, line.response.status_code, body)
        return replies

    def _keep_reply(self, key: str, body: bytes) -> bool:
        result = read_reply(body, self._prices, batch=True)
        if result is None:  # paid, and would be paid again
            self._refused[key] = self._failures.malformed().error
            return False
        if self._cache.get(key) is None:  # else it was read before the process ended
            self._ledger.arrived(key)
            self._cache.put(key, result)
        return True

    def _note_refusal(self, key: str, status: int, body: bytes) -> None:
        refusal = Refusal.read(body)
        plainer = self._dialect.plainer(refusal.param, structured=False)
        if plainer is not None and status == 400:
            self._dialect = plainer
            return
        failure = self._failures.refused(status, {}, refusal)
        if not isinstance(failure, Transient):
            self._refused[key] = failure

    async def _get(self, path: str) -> bytes:
        return self._checked(await self._transport.get(path))

    def _checked(self, answer: Answer) -> bytes:
        if answer.status != 200:
            raise self._failures.refused(answer.status, answer.headers, Refusal.read(answer.body))
        return answer.body


def _parsed(kind: type[T], body: bytes, failures: Failures) -> T:
    try:
        return kind.model_validate_json(body)
    except ValidationError:
        pass
    raise failures.malformed()
