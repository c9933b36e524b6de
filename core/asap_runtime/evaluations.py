"""The questions of an evaluation: the benchmarks of its configuration, one item for each task.

A task whose question two benchmarks share, as HumanEval and HumanEval+ do, is one item with the
tests of both. The order follows from the files alone: whoever goes on where another process stopped
leaves out as many items as are in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from asap.errors import InvalidInput, NotFound
from asap.eval_config import EvalConfig
from asap.eval_items import EvalData, EvalItem
from asap.payloads import route_of
from asap.problems import Problem, ProblemRef
from asap_runtime.benchmarks import BenchmarkFolder
from asap_runtime.blobs import BlobStore
from asap_runtime.intake import StoredEvaluation
from asap_runtime.takings import Taking
from asap_runtime.values import NewItem

__all__ = ["Questions", "evaluation_items", "load_questions"]

INLINE_BYTES = 256 * 2**10
"""Of a problem's JSON; a larger one, for its tests, lies in the blob store."""
LONGEST_CUSTOM_ID = 512


@dataclass(frozen=True, slots=True)
class Questions:
    """What is asked, each question with its problems, and where that comes from by benchmark."""

    groups: tuple[tuple[Problem, ...], ...]
    data: Mapping[str, EvalData]


def load_questions(
    folder: BenchmarkFolder, config: EvalConfig, beat: Callable[[], None] = lambda: None
) -> Questions:
    """All questions of a configuration, in the order of its benchmarks and of their files.

    `beat` is called again and again while files are read. Raises InvalidInput for a benchmark that
    the folder lacks or that cannot be read, NotFound for one without a task.
    """
    groups: dict[tuple[object, ...], list[Problem]] = {}
    data: dict[str, EvalData] = {}
    for name in config.benchmarks:
        loaded = folder.load(name, beat)
        problems = loaded.problems[: config.limit]
        data[name] = EvalData(sha256=loaded.sha256, tasks=len(problems))
        asked: Counter[str] = Counter()
        for problem in problems:
            # One benchmark may ask the same twice; its tests differ, and so do the items.
            key = (problem.prompt, config.budgets_of(name), asked[problem.prompt])
            asked[problem.prompt] += 1
            groups.setdefault(key, []).append(problem)
    return Questions(tuple(map(tuple, groups.values())), data)


def evaluation_items(
    folder: BenchmarkFolder,
    blobs: BlobStore,
    taking: Taking,
    source: StoredEvaluation,
    first: bytes | None,
    beat: Callable[[], None],
) -> Iterator[NewItem]:
    """The items of the job behind those that are in. Large problems go to the blob store, each
    under its hash, so that equal ones lie there once.

    `first` is the payload of the job's first item, once it has one. `beat` is called again and
    again: it may extend a lease, or end the work by an exception. Raises as `load_questions` does,
    and InvalidInput when a file has changed since the first item.
    """
    config = EvalConfig.model_validate(taking.config)
    questions = load_questions(folder, config, beat)
    if first is not None and EvalItem.model_validate_json(first).data != questions.data:
        raise InvalidInput("a benchmark's file has changed while the job was taken in")
    names = _names(questions.groups)
    for number, group in enumerate(questions.groups[taking.items :], start=taking.items):
        item = EvalItem(
            id=taking.job_id,
            tenant=taking.tenant,
            config=config,
            model=source.model,
            model_prefix=source.model_prefix,
            model_sha256=source.model_sha256,
            data=dict(questions.data),
            problems=tuple(_stored(blobs, taking.tenant, problem) for problem in group),
        )
        beat()
        yield NewItem(number + 1, route_of(item)[0], item.model_dump_json().encode(), names[number])


def _names(groups: Sequence[Sequence[Problem]]) -> list[str | None]:
    """By group a name of its own: the task's id, with the benchmark before it where it is taken."""
    names: list[str | None] = []
    taken: set[str] = set()
    for first, *_ in groups:
        name = first.task_id
        if name in taken:
            name = f"{first.benchmark}:{name}"
        free = name not in taken and len(name) <= LONGEST_CUSTOM_ID
        names.append(name if free else None)
        taken.add(name)
    return names


def _stored(blobs: BlobStore, tenant: str, problem: Problem) -> Problem | ProblemRef:
    whole = problem.model_dump_json().encode()
    if len(whole) <= INLINE_BYTES:
        return problem
    key = f"{tenant}/problems/{problem.sha256}.json"
    try:
        blobs.size(key)
    except NotFound:
        with blobs.create(key) as writer:
            writer.write(whole)
    return ProblemRef(
        benchmark=problem.benchmark,
        task_id=problem.task_id,
        prompt=problem.prompt,
        sha256=problem.sha256,
        key=key,
    )
