"""`TorchScorer`: a causal LM gives each step of a CoT its scores, in process (§3.3, Algorithm 2).

Three things happen at the same time: workers tokenise what comes next, one thread queues passes on
the device, another turns finished values into scores. Importing this module imports torch; import
it where a scorer is really made.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, Self, get_args

import torch

from asap.config import ScoreName
from asap.errors import CapacityError
from asap.ports import ScoreRequest
from asap.types import StepScores
from asap_runtime.model_files import DEFAULT_MODEL
from asap_surprisal.batching import plan_batches
from asap_surprisal.forward import CausalLM, PassRow, Pending, launch
from asap_surprisal.loading import Device, Dtype, load_model
from asap_surprisal.metering import Meter, ScorerTotals, peak_rate
from asap_surprisal.prefix import PrefixStore, Round
from asap_surprisal.preparation import Prepared, prepare, step_scores
from asap_surprisal.sharing import share_beginnings
from asap_surprisal.tokenization import HFTokenCounter

__all__ = ["TorchScorer"]

_LEAST_WINDOW = 16  # a smaller limit is a place-holder
_WORKERS = 4
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
)
_KEPT_BATCHES = 4
"""Batches whose keys and values may stay between rounds, where the caller fixes the batch."""


@contextmanager
def _telling_of_the_device() -> Iterator[None]:
    """A device that is lost is nobody's fault: what it was asked for can be asked elsewhere."""
    try:
        yield
    except torch.AcceleratorError as error:
        raise CapacityError(
            "the device fails; its process needs a new start", code="not-ready"
        ) from error


@dataclass(frozen=True, slots=True)
class _Launched:
    """A pass on the device and whose rows it runs."""

    rows: list[PassRow]
    owners: list[int]
    pending: Pending


class TorchScorer:
    """The port `asap.ports.Scorer` on transformers. One device thread, packed batches.

    Any number of `score` calls may run at once: they queue for the device, never for each other's
    tokenisation.

    Args:
        name: names model and tokenizer wherever a score or count is shown.
        model: its backbone and output head, on their device.
        counter: the model's tokenizer.
        max_batch_tokens: tokens of a forward pass; a single row may be longer.
        max_kept_tokens: whose keys and values may stay for a session's next round.
        max_row_tokens: the longest sequence that memory is sure to hold; a batch's tokens if None.
    """

    offers: frozenset[ScoreName] = frozenset(get_args(ScoreName))
    """The scores that it can give: all."""

    def __init__(
        self,
        name: str,
        model: CausalLM,
        counter: HFTokenCounter,
        *,
        max_batch_tokens: int = 8192,
        max_kept_tokens: int | None = None,
        max_row_tokens: int | None = None,
    ) -> None:
        self._name, self._model, self._counter = name, model, counter
        self.max_batch_tokens = max_batch_tokens
        """Tokens of a forward pass."""
        # The model knows best: the tokenizer of the R1 distillations says 16,384 where they have
        # 131,072 positions, and their longest traces would be cut for nothing.
        limit = model.max_positions or counter.max_length or 0
        self.window: int = limit if limit >= _LEAST_WINDOW else 2**31
        """Longest input in tokens, BOS included."""
        longest = max_row_tokens or max_batch_tokens
        self.max_text_tokens: int | None = None if self.window <= longest else longest
        """Longest text to admit; None when any is welcome, because windows of it fit the device."""
        kept = _KEPT_BATCHES * max_batch_tokens if max_kept_tokens is None else max_kept_tokens
        self._store = PrefixStore(kept if model.packs else 0)
        self._meter = Meter()
        self._device = ThreadPoolExecutor(max_workers=1, thread_name_prefix="surprisal")
        self._workers = ThreadPoolExecutor(_WORKERS, thread_name_prefix="surprisal-text")
        # of its own, because it waits for the device and nobody's tokenisation should
        self._collector = ThreadPoolExecutor(1, thread_name_prefix="surprisal-values")

    @classmethod
    def load(
        cls,
        model: str = DEFAULT_MODEL,
        *,
        device: Device = "auto",
        dtype: Dtype = "auto",
        max_batch_tokens: int | Literal["auto"] = "auto",
    ) -> Self:
        """A scorer from a hub name, a local directory or "demo".

        `auto`: the GPU in bfloat16 where there is one, else the CPU in float32; and as many tokens
        in a batch as free memory allows and speed asks for. `fp8` computes in the same types and
        keeps the weights of the layers in one byte each (see `quantize`). Raises Misconfigured with
        one sentence when files are missing or damaged, CapacityError when the device is too small.
        """
        counter = HFTokenCounter.load(model)
        loaded = load_model(model, device, dtype)
        if max_batch_tokens != "auto":
            return cls(model, loaded, counter, max_batch_tokens=max_batch_tokens)
        budget = loaded.budget
        return cls(
            model,
            loaded,
            counter,
            max_batch_tokens=budget.batch,
            max_kept_tokens=budget.kept,
            max_row_tokens=budget.longest,
        )

    @property
    def name(self) -> str:
        """The model as it was named to `load`."""
        return self._name

    @property
    def tokenizer_name(self) -> str:
        """The same name: a tokenizer belongs to its model."""
        return self._counter.tokenizer_name

    @property
    def totals(self) -> ScorerTotals:
        """What the device has done so far."""
        return self._meter.totals

    def peak_rate(self) -> float:
        """Operations per second that the device reaches in a large matrix product, measured now.

        To be asked before work begins; `totals.operations / totals.busy_s` is the rate achieved.
        """
        return peak_rate(self._model.device, self._model.dtype)

    def count(self, text: str) -> int:
        """Number of ids of `text`, special tokens not included."""
        return self._counter.count(text)

    def prepare(self, request: ScoreRequest) -> Prepared:
        """The request tokenised, in any thread; `tokens` is what it costs the device."""
        return prepare(request, self._counter, self.window)

    async def score(self, requests: Sequence[ScoreRequest]) -> list[StepScores]:
        """Scores for each request, in order."""
        loop = asyncio.get_running_loop()
        ready = (loop.run_in_executor(self._workers, self.prepare, request) for request in requests)
        return await self.score_prepared(await asyncio.gather(*ready))

    async def score_prepared(self, prepared: Sequence[Prepared]) -> list[StepScores]:
        """Scores for each request that `prepare` made ready, in order."""
        loop = asyncio.get_running_loop()
        rounds, launched = await loop.run_in_executor(self._device, self._launch_all, prepared)
        collect = partial(self._collect, prepared, rounds, launched)
        return await loop.run_in_executor(self._collector, collect)

    def close(self) -> None:
        """Wait for all threads and end them."""
        for threads in (self._workers, self._device, self._collector):
            threads.shutdown()

    def score_batch(self, requests: Sequence[ScoreRequest]) -> list[StepScores]:
        """`score`, blocking. Raises CapacityError when one sequence does not fit the device."""
        prepared = [self.prepare(request) for request in requests]
        return self._collect(prepared, *self._launch_all(prepared))

    @_telling_of_the_device()
    def _launch_all(self, prepared: Sequence[Prepared]) -> tuple[dict[int, Round], list[_Launched]]:
        """Every pass that the requests need, started in the thread of the device."""
        rows: list[PassRow] = []
        owners: list[int] = []
        questions: list[tuple[str, str] | None] = []
        rounds: dict[int, Round] = {}
        for i, ready in enumerate(prepared):
            request, alike = ready.request, None
            parts = [PassRow(row) for row in ready.plan.rows]
            if len(parts) == 1 and self._model.packs:
                if request.session is not None:
                    rounds[i] = self._store.begin(request.session, parts[0].row)
                    parts = [rounds[i].work]
                else:
                    alike = (request.question, request.context)
            rows += parts
            owners += [i] * len(parts)
            questions += [alike] * len(parts)
        first, rows = share_beginnings(rows, questions, most=self._store.max_tokens)
        launched = self._launch_batches(first, [0] * len(first))  # nobody's: they score nothing
        return rounds, launched + self._launch_batches(rows, owners)

    def _launch_batches(self, rows: list[PassRow], owners: list[int]) -> list[_Launched]:
        most = self.max_batch_tokens if self._model.packs else 1  # one row in each pass
        launched: list[_Launched] = []
        # whole rows: attention lays known keys and values beside the new ones
        for batch in plan_batches([len(row.row.ids) for row in rows], most):
            launched += self._launch([rows[i] for i in batch], [owners[i] for i in batch])
        return launched

    def _launch(self, rows: list[PassRow], owners: list[int]) -> list[_Launched]:
        """One batch; on a lack of memory its halves, down to single rows."""
        try:
            return [_Launched(rows, owners, launch(self._model, rows))]
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            traceback.clear_frames(
                error.__traceback__
            )  # they hold the tensors that filled the device
            self._store.clear()
            if len(rows) == 1:
                raise CapacityError(
                    f"the device has too little memory for one sequence of {len(rows[0].row.ids)} "
                    "tokens; free some of it or use a smaller model",
                    tokens=len(rows[0].row.ids),
                ) from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        middle = len(rows) // 2
        return self._launch(rows[:middle], owners[:middle]) + self._launch(
            rows[middle:], owners[middle:]
        )

    @_telling_of_the_device()
    def _collect(
        self,
        prepared: Sequence[Prepared],
        rounds: dict[int, Round],
        launched: list[_Launched],
    ) -> list[StepScores]:
        """Wait for the device, outside its thread, and put the values together."""
        values: list[dict[int, tuple[float, float]]] = [
            dict(rounds[i].known) if i in rounds else {} for i in range(len(prepared))
        ]
        for one in launched:
            for row, owner, found in zip(one.rows, one.owners, one.pending.values(), strict=True):
                values[owner].update(zip(row.row.tokens, found, strict=True))
            self._measure(one)
        for i, done in rounds.items():
            done.values = values[i]
        self._meter.add(steps=sum(len(ready.plan.steps) for ready in prepared))
        return [step_scores(ready, known) for ready, known in zip(prepared, values, strict=True)]

    def _measure(self, one: _Launched) -> None:
        cost = self._model.cost
        self._meter.add(
            passes=1,
            rows=len(one.rows),
            tokens=sum(row.tokens for row in one.rows),
            tokens_reused=sum(row.reused for row in one.rows),
            busy_s=one.pending.seconds,
            operations=sum(
                cost.operations(
                    whole=len(row.row.ids), reused=row.reused, positions=len(row.row.positions)
                )
                for row in one.rows
            ),
        )


def _is_out_of_memory(error: RuntimeError) -> bool:
    """CUDA has a class for it; the CPU's allocator and cuBLAS only words."""
    told = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(word in told for word in _OUT_OF_MEMORY)
