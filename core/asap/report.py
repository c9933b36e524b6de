"""The report of an evaluation: rows of metrics, comparisons of models with their tests, and what is
missing. Pure: the same results in any order give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from pydantic import Field, JsonValue

from asap.errors import InvalidInput
from asap.eval_config import Extraction, benchmark_of
from asap.metrics import (
    MetricsRow,
    Result,
    by_task,
    generation_seconds,
    kept_ratio,
    measure,
)
from asap.significance import Interval, Wilcoxon, bootstrap_mean, holm, mcnemar, wilcoxon
from asap.types import Frozen

__all__ = ["Across", "Comparison", "Difference", "Report", "build_report"]

Group = tuple[str, int, Extraction]
"""Benchmark, budget, extraction."""


class Comparison(Frozen):
    """The candidate against one baseline on the completions that both were scored on. Differences
    are candidate less baseline; of several completions of a task the first decides whether it is
    solved, the mean gives its tokens and its share of passes.
    """

    benchmark: str
    budget: int
    extraction: Extraction
    baseline: str
    tasks: int
    both: int
    only_candidate: int
    only_baseline: int
    mcnemar_p: float
    """Exact, two-sided."""
    mcnemar_p_holm: float
    """Corrected for the number of baselines."""
    accuracy: Interval
    """Of the accuracy's difference, in percent points."""
    tokens: Interval
    kept_ratio: float
    """Tokens of the candidate per token of the baseline."""
    tokens_wilcox: Wilcoxon
    """Of the tokens of each task, differences of zero left out."""
    tokens_pratt: Wilcoxon
    """The same with differences of zero ranked."""
    tokens_p_holm: float
    """Two-sided p of `tokens_wilcox`, corrected for the number of baselines."""


class Across(Frozen):
    """The candidate against one baseline over benchmark accuracies, one pair for each benchmark at
    its largest common budget: the paper's unit, with far too few pairs for more than a hint.
    """

    extraction: Extraction
    baseline: str
    benchmarks: tuple[str, ...]
    test: Wilcoxon


class Difference(Frozen):
    """A task that one of two models solves and the other does not."""

    benchmark: str
    budget: int
    extraction: Extraction
    task_id: str
    number: int
    baseline: str
    baseline_verdict: str
    candidate_verdict: str
    baseline_tokens: int
    candidate_tokens: int


class Report(Frozen):
    """All that an evaluation says, without any completion."""

    kind: Literal["report"] = "report"
    version: Literal[1] = 1
    candidate: str | None
    models: tuple[str, ...]
    """The baselines by name, the candidate last."""
    rows: tuple[MetricsRow, ...]
    comparisons: tuple[Comparison, ...] = ()
    across: tuple[Across, ...] = ()
    differences: tuple[Difference, ...] = ()
    incomplete: tuple[str, ...] = ()
    """What is missing, one sentence each; empty for a whole evaluation."""
    provenance: dict[str, JsonValue] = Field(default_factory=dict)
    """Configuration, data, engine and sandbox, as the caller knows them."""

    @property
    def groups(self) -> list[Group]:
        """Benchmark, budget and extraction of the rows, each once, in order."""
        return list(dict.fromkeys((r.benchmark, r.budget, r.extraction) for r in self.rows))

    def rows_of(self, group: Group) -> list[MetricsRow]:
        """The rows of a group in the order of `models`."""
        return [r for r in self.rows if (r.benchmark, r.budget, r.extraction) == group]

    def curve(self, model: str, benchmark: str, extraction: Extraction) -> list[MetricsRow]:
        """A model's rows by budget: accuracy against tokens."""
        mine = (model, benchmark, extraction)
        return [r for r in self.rows if (r.model, r.benchmark, r.extraction) == mine]

    def to_json(self) -> str:
        """Canonical JSON with a newline at the end."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1) + "\n"


def build_report(
    results: Mapping[str, Iterable[Result]],
    *,
    candidate: str | None = None,
    expected: Mapping[str, int] | None = None,
    seed: int = 0,
    provenance: Mapping[str, JsonValue] | None = None,
) -> Report:
    """The report of each model's results, which may repeat themselves.

    `candidate` names the model that is compared with each of the others. `expected`: tasks of each
    benchmark that was asked, where they are not those of `BENCHMARKS`. Raises InvalidInput:
    `unknown-model` for a candidate without results, `conflicting-results` for two results of one
    completion.
    """
    if candidate is not None and candidate not in results:
        raise InvalidInput(f"there are no results of {candidate!r}", code="unknown-model")
    models = tuple(sorted(results, key=lambda name: (name == candidate, name)))
    grouped = {model: _grouped(model, results[model]) for model in models}
    seconds = {
        model: generation_seconds(result for group in groups.values() for result in group)
        for model, groups in grouped.items()
    }
    order = sorted({group for groups in grouped.values() for group in groups}, key=_place)
    rows = [
        measure(model, grouped[model][group], seed=seed, seconds_of=seconds[model])
        for group in order
        for model in models
        if group in grouped[model]
    ]
    report = Report(
        candidate=candidate,
        models=models,
        rows=tuple(rows),
        incomplete=tuple(_incomplete(rows, expected or {})),
        provenance=dict(provenance or {}),
    )
    if candidate is None:
        return report
    pairs = {
        group: {
            model: (grouped[candidate][group], grouped[model][group])
            for model in models[:-1]
            if group in grouped[model]
        }
        for group in order
        if group in grouped[candidate]
    }
    return report.model_copy(
        update={
            "comparisons": tuple(c for g, pair in pairs.items() for c in _compare(g, pair, seed)),
            "across": tuple(_across(report)),
            "differences": tuple(
                difference
                for group, pair in pairs.items()
                for baseline, (mine, theirs) in pair.items()
                for difference in _differences(group, baseline, mine, theirs)
            ),
        }
    )


def _place(group: Group) -> tuple[object, ...]:
    benchmark, budget, extraction = group
    return benchmark, extraction != "strict", budget


def _grouped(model: str, results: Iterable[Result]) -> dict[Group, list[Result]]:
    seen: dict[tuple[object, ...], Result] = {}
    groups: dict[Group, list[Result]] = {}
    for result in results:
        group = (result.benchmark, result.budget, result.extraction)
        key = (*group, result.task_id, result.number)
        if key not in seen:
            seen[key] = result
            groups.setdefault(group, []).append(result)
        elif seen[key] != result:
            raise InvalidInput(
                f"{model}: {result.task_id}, completion {result.number} at {result.budget} tokens "
                "has two different results",
                code="conflicting-results",
            )
    return groups


def _incomplete(rows: Sequence[MetricsRow], expected: Mapping[str, int]) -> Iterable[str]:
    for benchmark in expected:
        if all(row.benchmark != benchmark for row in rows):
            yield f"{benchmark}: no task is done"
    for row in rows:
        whole = expected.get(row.benchmark, benchmark_of(row.benchmark).tasks)
        where = f"{row.model}, {row.benchmark} at {row.budget} tokens, {row.extraction}"
        if whole is not None and row.tasks < whole:
            yield f"{where}: {row.tasks} of {whole} tasks are scored"
        if row.unscored:
            yield f"{where}: {row.unscored} of {row.samples} completions have no verdict"


def _scored_pairs(
    mine: Iterable[Result], theirs: Iterable[Result]
) -> dict[str, tuple[list[Result], list[Result]]]:
    """By task, the completions of the same numbers on both sides."""
    left, right = (
        {(r.task_id, r.number): r for r in results if r.scored} for results in (mine, theirs)
    )
    common = left.keys() & right.keys()
    first, second = (by_task(side[key] for key in common) for side in (left, right))
    return {task: (first[task], second[task]) for task in first}


def _compare(
    group: Group, pairs: Mapping[str, tuple[list[Result], list[Result]]], seed: int
) -> Iterable[Comparison]:
    common = {name: _scored_pairs(*pair) for name, pair in pairs.items()}
    raw = [_raw(group, name, tasks, seed) for name, tasks in common.items() if tasks]
    by_passes = holm({c.baseline: c.mcnemar_p for c in raw})
    by_tokens = holm({c.baseline: c.tokens_wilcox.p_two_sided for c in raw})
    for c in raw:
        yield c.model_copy(
            update={
                "mcnemar_p_holm": by_passes[c.baseline],
                "tokens_p_holm": by_tokens[c.baseline],
            }
        )


def _raw(
    group: Group, baseline: str, tasks: Mapping[str, tuple[list[Result], list[Result]]], seed: int
) -> Comparison:
    solved = [(mine[0].passed, theirs[0].passed) for mine, theirs in tasks.values()]
    passes = [
        100 * (_mean([r.passed for r in m]) - _mean([r.passed for r in t]))
        for m, t in tasks.values()
    ]
    used = [(_mean([r.tokens for r in m]), _mean([r.tokens for r in t])) for m, t in tasks.values()]
    tokens = [mine - theirs for mine, theirs in used]
    only_candidate, only_baseline = solved.count((True, False)), solved.count((False, True))
    p = mcnemar(only_candidate, only_baseline)
    wilcox = wilcoxon(tokens)
    return Comparison(
        benchmark=group[0],
        budget=group[1],
        extraction=group[2],
        baseline=baseline,
        tasks=len(tasks),
        both=solved.count((True, True)),
        only_candidate=only_candidate,
        only_baseline=only_baseline,
        mcnemar_p=p,
        mcnemar_p_holm=p,
        accuracy=bootstrap_mean(passes, seed=seed),
        tokens=bootstrap_mean(tokens, seed=seed),
        kept_ratio=kept_ratio(sum(m for m, _ in used), sum(t for _, t in used)),
        tokens_wilcox=wilcox,
        tokens_pratt=wilcoxon(tokens, zeros="pratt"),
        tokens_p_holm=wilcox.p_two_sided,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _across(report: Report) -> Iterable[Across]:
    extractions = dict.fromkeys(row.extraction for row in report.rows)
    for extraction in extractions:
        for baseline in report.models[:-1]:
            pairs: dict[str, float] = {}
            for benchmark, budget, _ in sorted(g for g in report.groups if g[2] == extraction):
                rows = {r.model: r for r in report.rows_of((benchmark, budget, extraction))}
                if baseline in rows and report.candidate in rows:
                    pairs[benchmark] = rows[report.candidate].accuracy - rows[baseline].accuracy
            if len(pairs) > 1:
                yield Across(
                    extraction=extraction,
                    baseline=baseline,
                    benchmarks=tuple(pairs),
                    test=wilcoxon(list(pairs.values())),
                )


def _differences(
    group: Group, baseline: str, mine: Iterable[Result], theirs: Iterable[Result]
) -> Iterable[Difference]:
    for task_id, (own, other) in _scored_pairs(mine, theirs).items():
        if own[0].passed != other[0].passed:
            yield Difference(
                benchmark=group[0],
                budget=group[1],
                extraction=group[2],
                task_id=task_id,
                number=own[0].number,
                baseline=baseline,
                baseline_verdict=str(other[0].verdict),
                candidate_verdict=str(own[0].verdict),
                baseline_tokens=other[0].tokens,
                candidate_tokens=own[0].tokens,
            )
