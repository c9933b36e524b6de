"""`TorchScorer`: a causal LM gives each step of a CoT its scores, in process (§3.3, Algorithm 2).

Importing this module imports torch; import it where a scorer is really made.
"""

from __future__ import annotations

import asyncio
import math
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from statistics import fmean
from typing import Self

import torch

from asap.config import ScoreName
from asap.errors import CapacityError
from asap.ports import ScoreRequest
from asap.steps import SEPARATOR, join_steps
from asap.surprisal import build_context
from asap.types import StepScores
from asap_surprisal.batching import plan_batches
from asap_surprisal.forward import CausalLM, score_rows
from asap_surprisal.loading import Device, Dtype, load_model
from asap_surprisal.model_files import DEFAULT_MODEL
from asap_surprisal.sequence import Row, SequencePlan, plan_sequence
from asap_surprisal.tokenization import HFTokenCounter

__all__ = ["TorchScorer"]

_EVERY_TOKEN: frozenset[ScoreName] = frozenset({"mean_surprisal", "step_entropy"})
_DECIMALS = 6  # of a score: what selection sees is exactly what the JSON line holds
_LEAST_WINDOW = 16  # a smaller `model_max_length` is a place-holder, not a limit

Values = Mapping[int, tuple[float, float]]
"""(surprisal, entropy) in nats by token index."""


class TorchScorer:
    """The port `asap.ports.Scorer` on transformers. One device thread, batched requests.

    Args:
        name: names model and tokenizer wherever a score or count is shown.
        model: its backbone and output head, on their device.
        counter: the model's tokenizer.
        max_batch_tokens: bound on longest row x rows of a forward pass; one row may be longer.
    """

    def __init__(
        self,
        name: str,
        model: CausalLM,
        counter: HFTokenCounter,
        *,
        max_batch_tokens: int = 8192,
    ) -> None:
        self._name, self._model, self._counter = name, model, counter
        self._max_batch_tokens = max_batch_tokens
        limits = (model.max_positions, counter.max_length)
        self.window: int = min((n for n in limits if n and n >= _LEAST_WINDOW), default=2**31)
        """Longest input in tokens, BOS included."""
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="surprisal")

    @classmethod
    def load(
        cls,
        model: str = DEFAULT_MODEL,
        *,
        device: Device = "auto",
        dtype: Dtype = "auto",
        max_batch_tokens: int = 8192,
    ) -> Self:
        """A scorer from a hub name, a local directory or "demo".

        `auto`: the GPU in bfloat16 where there is one, else the CPU in float32. Raises
        Misconfigured with one sentence when files are missing or damaged, CapacityError when the
        device is too small.
        """
        counter = HFTokenCounter.load(model)
        return cls(
            model, load_model(model, device, dtype), counter, max_batch_tokens=max_batch_tokens
        )

    @property
    def name(self) -> str:
        """The model as it was named to `load`."""
        return self._name

    @property
    def tokenizer_name(self) -> str:
        """The same name: a tokenizer belongs to its model."""
        return self._counter.tokenizer_name

    def count(self, text: str) -> int:
        """Number of ids of `text`, special tokens not included."""
        return self._counter.count(text)

    async def score(self, requests: Sequence[ScoreRequest]) -> list[StepScores]:
        """Scores for each request, in order, computed in the device thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self.score_batch, requests)

    def close(self) -> None:
        """Wait for the device thread and end it."""
        self._executor.shutdown()

    def score_batch(self, requests: Sequence[ScoreRequest]) -> list[StepScores]:
        """`score`, blocking. Raises CapacityError when one sequence does not fit the device."""
        plans = [self._plan(request) for request in requests]
        rows = [row for plan in plans for row in plan.rows]
        owners = [i for i, plan in enumerate(plans) for _ in plan.rows]
        values: list[dict[int, tuple[float, float]]] = [{} for _ in requests]
        for batch in plan_batches([len(row.ids) for row in rows], self._max_batch_tokens):
            scored = self._forward([rows[i] for i in batch])
            for i, row_values in zip(batch, scored, strict=True):
                values[owners[i]].update(zip(rows[i].tokens, row_values, strict=True))
        return [
            self._assemble(request, plan, known)
            for request, plan, known in zip(requests, plans, values, strict=True)
        ]

    def _plan(self, request: ScoreRequest) -> SequencePlan:
        if not request.scores or not request.steps:
            return SequencePlan([], [range(0)] * len(request.steps), ())
        context = build_context(request.question, request.steps, request.context)
        encoding = self._counter.encode(context.text)
        return plan_sequence(
            encoding.ids,
            encoding.offsets,
            context,
            bos_id=self._counter.bos_id,
            window=self.window,
            every_token=not _EVERY_TOKEN.isdisjoint(request.scores),
        )

    def _forward(self, rows: list[Row]) -> list[list[tuple[float, float]]]:
        """One batch; on a lack of memory its halves, down to single rows."""
        try:
            return score_rows(self._model, rows)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            traceback.clear_frames(
                error.__traceback__
            )  # they hold the tensors that filled the device
            if len(rows) == 1:
                raise CapacityError(
                    f"the device has too little memory for one sequence of {len(rows[0].ids)} "
                    "tokens; free some of it or use a smaller model",
                    tokens=len(rows[0].ids),
                ) from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        middle = len(rows) // 2
        return self._forward(rows[:middle]) + self._forward(rows[middle:])

    def _assemble(self, request: ScoreRequest, plan: SequencePlan, values: Values) -> StepScores:
        steps = request.steps
        counts = self._counter.count_all(
            [join_steps(steps), *steps, *(step + SEPARATOR for step in steps)]
        )
        total, tokens, joined = counts[0], counts[1 : len(steps) + 1], counts[len(steps) + 1 :]
        flags = list(plan.flags)
        if sum(chain(joined[:-1], tokens[-1:])) != total:
            flags.append("counts_not_additive")
        return StepScores(
            scores={
                score: tuple(_step_score(score, step, values) for step in plan.steps)
                for score in request.scores
            },
            tokens=tuple(tokens),
            tokens_joined=tuple(joined),
            total=total,
            bos=int(self._counter.bos_id is not None),
            flags=tuple(flags),
        )


def _step_score(score: ScoreName, step: range, values: Values) -> float | None:
    """The step's score; None where a token has no finite value, so that the step is kept."""
    tokens = step if score in _EVERY_TOKEN else step[:1]
    column = 0 if score in ("first_token_surprisal", "mean_surprisal") else 1
    found = [values[token][column] for token in tokens if token in values]
    if not found or len(found) < len(tokens):
        return None
    mean = fmean(found)
    return (
        round(mean, _DECIMALS) + 0.0 if math.isfinite(mean) else None
    )  # + 0.0 turns -0.0 into 0.0


def _is_out_of_memory(error: RuntimeError) -> bool:
    """CUDA has a class for it, the CPU's allocator only words."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
