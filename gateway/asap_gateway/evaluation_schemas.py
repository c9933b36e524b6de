"""Bodies of answers about evaluations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ConfigDict

from asap.eval_config import Extraction
from asap.eval_items import EvalData, EvalItem
from asap.metrics import MetricsRow
from asap_runtime.phases import StageCount
from asap_runtime.tables import FINAL

__all__ = ["EvaluateEstimateBody", "EvaluationBody", "FigureBody"]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class EvaluateEstimateBody(_Body):
    """What an evaluation would ask: the answer to `dry_run`."""

    benchmarks: dict[str, EvalData]
    questions: int
    """Items: a question that two benchmarks share is asked once."""
    generations: int
    prompt_tokens: int
    """Of all generations, without what a chat template adds."""
    most_completion_tokens: int
    """If each generation were as long as its budget."""
    tokenizer: str


class FigureBody(_Body):
    """What a model reached on a benchmark at one budget, code taken one way."""

    benchmark: str
    budget: int
    extraction: Extraction
    tasks: int
    """Scored ones."""
    pass_at_1: float
    """Percent."""
    tokens: float
    """Mean generated tokens of a completion."""

    @classmethod
    def of(cls, row: MetricsRow) -> FigureBody:
        """The body of a report's row."""
        return cls(
            benchmark=row.benchmark,
            budget=row.budget,
            extraction=row.extraction,
            tasks=row.tasks,
            pass_at_1=row.accuracy,
            tokens=row.tokens,
        )


class EvaluationBody(_Body):
    """How an evaluation stands, beside its job's phase. Null before its questions are there."""

    model: str
    model_sha256: str | None
    """Of the manifest of a registered model's files."""
    benchmarks: dict[str, EvalData]
    """Which data is asked, by its hash."""
    questions: int
    generated: int
    """Questions whose completions are there, graded or not."""
    done: int
    figures: list[FigureBody] | None
    """A moment after its end; while it runs see the report with `partial`."""

    @classmethod
    def of(
        cls, first: EvalItem, counts: Sequence[StageCount], rows: Iterable[MetricsRow] | None
    ) -> EvaluationBody:
        """The body of an evaluation, from any of its items."""
        done = sum(count.items for count in counts if count.status in FINAL)
        at_grade = sum(c.items for c in counts if c.stage == "grade" and c.status not in FINAL)
        return cls(
            model=first.model,
            model_sha256=first.model_sha256,
            benchmarks=first.data,
            questions=sum(count.items for count in counts),
            generated=done + at_grade,
            done=done,
            figures=None if rows is None else [FigureBody.of(row) for row in rows],
        )
