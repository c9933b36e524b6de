"""The two stages of an evaluation: `generate` asks the model, `grade` runs its programs.

Both keep what they have: a payload that comes back with samples or grades is only completed, and
long work ends with `Wait` from time to time, so that a killed worker loses little.
"""

from __future__ import annotations

import asyncio
import time

from pydantic import ValidationError

from asap.errors import CapacityError, InvalidInput
from asap.eval_config import BENCHMARKS, Extraction
from asap.eval_items import EvalItem, GradedSample
from asap.extraction import extract_code
from asap.grades import Grade
from asap.problems import Problem, ProblemRef, Sample
from asap_evaluator.generate import Generator
from asap_evaluator.grader import Grader
from asap_evaluator.isolation import Limits
from asap_evaluator.model_cache import ModelCache, ModelSource
from asap_evaluator.sandbox import LEVELS, Sandbox, physical_cores
from asap_evaluator.serving import GivenServing, OwnServing, Serving
from asap_evaluator.settings import EvaluatorSettings
from asap_runtime.blobs import BlobStore
from asap_runtime.logs import get_logger
from asap_runtime.stage import Done, Wait
from asap_runtime.telemetry import GRADES, SANDBOX_LEVEL, SANDBOX_SECONDS, SANDBOX_TROUBLE

__all__ = ["GenerateStage", "GradeStage"]

SAMPLES_AT_ONCE = 8
"""Completions of an item that run at the same time, and are saved together."""
PROGRAMS_AT_ONCE = 32
"""Programs of an item that are graded before their grades are saved."""
REOPEN_S = 60.0
"""Until a sandbox that did not hold is tried again."""
_OWN_DATA = "other"
"""Stands for benchmarks of callers in metrics: their names have no end."""


class GenerateStage:
    """Asks the model of an item its question, at each budget and sample number."""

    name = "generate"

    def __init__(self, settings: EvaluatorSettings, *, blobs: BlobStore) -> None:
        own = settings.evaluator
        cache = ModelCache(
            settings.evaluator_dir / "models", blobs, allowed=own.models, kept=own.kept_models
        )
        kind = OwnServing if own.base_url is None else GivenServing
        self._serving: Serving = kind(settings, cache)
        self.concurrency = own.concurrency
        """Items at the same time."""

    async def start(self) -> None:
        """Nothing: the first item says which model is to be served."""

    async def ready(self) -> None:
        """Raise CapacityError when the server is not healthy."""
        await self._serving.ready()

    async def process(self, item: EvalItem, /) -> Done[EvalItem] | Wait[EvalItem]:
        """The item with its next samples, all of one budget.

        Each budget is generated for itself. Under greedy decoding the completions of the smaller
        ones would be beginnings of the longest, but their times would not be those of such a run,
        and a batch that is put together otherwise may round to another token.
        """
        missing = _missing(item)
        if not missing:
            return Done(item)
        batch = [key for key in missing if key[0] == missing[0][0]][:SAMPLES_AT_ONCE]
        model = ModelSource(item.model, item.model_prefix, item.model_sha256)
        async with self._serving.use(model) as generator:
            samples = await _samples(item, generator, batch)
        grown = item.grown(samples=(*item.samples, *samples), engine=generator.facts)
        return Done(grown) if len(samples) == len(missing) else Wait(grown, 0.0)

    async def stop(self) -> None:
        """End the server, if it is ours."""
        await self._serving.close()


def _missing(item: EvalItem) -> list[tuple[int, int]]:
    """Budget and number of the samples that are not there, by budget."""
    there = {(sample.budget, sample.number) for sample in item.samples}
    numbers = range(item.config.samples)
    wanted = [(budget, number) for budget in sorted(item.budgets) for number in numbers]
    return [key for key in wanted if key not in there]


async def _samples(
    item: EvalItem, generator: Generator, batch: list[tuple[int, int]]
) -> list[Sample]:
    """The samples that came through; one that failed is asked for again with the rest. Raises what
    went wrong when none did.
    """
    prompt = await generator.prompt(item.prompt, item.config.template)
    tasks = [
        asyncio.create_task(
            generator.sample(
                prompt,
                item.config,
                task_id=item.problems[0].task_id,
                budget=budget,
                number=number,
            )
        )
        for budget, number in batch
    ]
    try:
        await asyncio.wait(tasks)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    samples = [result for result in results if isinstance(result, Sample)]
    if not samples:
        raise next(result for result in results if isinstance(result, BaseException))
    return samples


class GradeStage:
    """Runs the programs of an item's samples against its problems, each distinct one once."""

    name = "grade"

    def __init__(self, settings: EvaluatorSettings, *, blobs: BlobStore) -> None:
        self._settings, self._blobs = settings.evaluator, blobs
        self._programs = self._settings.grade_concurrency or physical_cores()
        self._grader: Grader | None = None
        self._refusal: CapacityError | None = None
        self._refused_at = float("-inf")
        self._opening = asyncio.Lock()
        self._log = get_logger()

    @property
    def concurrency(self) -> int:
        """Items at the same time; some wait so that no core does."""
        return 2 * self._programs

    @property
    def facts(self) -> dict[str, str]:
        """Of the sandbox, for the report. Empty without one."""
        return {} if self._grader is None else self._grader.sandbox.facts

    async def start(self) -> None:
        """Open the sandbox, which proves that it holds. Where none does, items wait."""
        try:
            await self._opened()
        except CapacityError as refusal:
            self._log.error("sandbox.refused", code=refusal.problem_code)

    async def ready(self) -> None:
        """Raise CapacityError (`sandbox-unavailable`) unless the sandbox passed its self-test."""
        if self._grader is None:
            raise self._refusal or CapacityError("there is no sandbox yet", code="not-ready")

    async def process(self, item: EvalItem, /) -> Done[EvalItem] | Wait[EvalItem]:
        """The item with grades for its samples, for each benchmark and extraction.

        Raises CapacityError (`sandbox-unavailable`) where no sandbox holds, InvalidInput when the
        problem in the blob store is another than the one that was asked.
        """
        grader = await self._opened()
        problems = [await asyncio.to_thread(self._whole, item, one) for one in item.problems]
        known, missing = _programs(item)
        batch = missing[:PROGRAMS_AT_ONCE]
        by_name = {problem.benchmark: problem for problem in problems}
        grades = await asyncio.gather(
            *(
                self._grade(grader, code, by_name[benchmark], add_imports=item.config.add_imports)
                for benchmark, code in batch
            )
        )
        known.update(zip(batch, grades, strict=True))
        grown = item.grown(grades=tuple(_graded(item, known)), sandbox=grader.sandbox.facts)
        return Done(grown) if len(batch) == len(missing) else Wait(grown, 0.0)

    async def stop(self) -> None:
        """Wait for the programs that run, and take the sandbox down."""
        if self._grader is not None:
            await asyncio.to_thread(self._grader.close)
            await asyncio.to_thread(self._grader.sandbox.close)
            self._grader = None

    async def _opened(self) -> Grader:
        async with self._opening:
            if self._grader is None:
                if self._refusal and time.monotonic() - self._refused_at < REOPEN_S:
                    raise self._refusal
                self._grader = await self._open()
            return self._grader

    async def _open(self) -> Grader:
        settings = self._settings
        try:
            sandbox = await asyncio.to_thread(
                Sandbox.open,
                least=settings.sandbox_min_level,
                limits=Limits(memory_bytes=settings.sandbox_memory_mib * 2**20),
                concurrency=self._programs,
                root=settings.sandbox_root,
                uid=settings.sandbox_uid,
                reference_cpu_s=settings.reference_cpu_s,
            )
        except CapacityError as refusal:
            SANDBOX_LEVEL.set(0)
            SANDBOX_TROUBLE.labels("unavailable").inc()
            self._refusal, self._refused_at = refusal, time.monotonic()
            raise
        names: tuple[str, ...] = LEVELS
        SANDBOX_LEVEL.set(len(names) - names.index(sandbox.level.name))
        self._log.info("sandbox.opened", **sandbox.facts)
        return Grader(sandbox, concurrency=self._programs)

    def _whole(self, item: EvalItem, problem: Problem | ProblemRef) -> Problem:
        """The problem with its tests, and the time limit of the configuration."""
        if isinstance(problem, ProblemRef):
            with self._blobs.open(problem.key) as stream:
                stored = stream.read()
            try:
                whole = Problem.model_validate_json(stored)
            except ValidationError:
                whole = None
            if whole is None or whole.sha256 != problem.sha256:
                raise InvalidInput("a problem's stored tests are not those that were asked for")
            problem = whole
        limit_s = item.config.time_limit_s
        if limit_s is None:
            return problem
        return Problem.model_validate({**problem.model_dump(), "time_limit_s": limit_s})

    async def _grade(
        self, grader: Grader, code: str | None, problem: Problem, *, add_imports: bool
    ) -> Grade:
        grade = await grader.grade(code, problem, add_imports=add_imports)
        benchmark = problem.benchmark if problem.benchmark in BENCHMARKS else _OWN_DATA
        GRADES.labels(benchmark, grade.verdict).inc()
        SANDBOX_SECONDS.observe(grade.seconds)
        if "retried" in grade.flags:
            SANDBOX_TROUBLE.labels("retried" if grade.scored else "unscored").inc()
        return grade


Program = tuple[str, str | None]
"""A benchmark and the code to run against its problem; None: there is none."""


def _cells(item: EvalItem) -> list[tuple[Sample, str, Extraction, Program]]:
    """All that is to be graded: sample, benchmark, extraction, and the program that decides it."""
    return [
        (sample, problem.benchmark, extraction, (problem.benchmark, code))
        for sample in item.samples
        for extraction in item.config.extractions
        for code in (extract_code(sample.text, extraction),)
        for problem in item.problems
    ]


def _programs(item: EvalItem) -> tuple[dict[Program, Grade], list[Program]]:
    """The grades of programs that have one, and the other programs, each once."""
    there = {(g.benchmark, g.budget, g.number, g.extraction): g.grade for g in item.grades}
    known: dict[Program, Grade] = {}
    cells = _cells(item)
    for sample, benchmark, extraction, program in cells:
        grade = there.get((benchmark, sample.budget, sample.number, extraction))
        if grade is not None:
            known[program] = grade
    missing = dict.fromkeys(cell[3] for cell in cells if cell[3] not in known)
    return known, list(missing)


def _graded(item: EvalItem, known: dict[Program, Grade]) -> list[GradedSample]:
    return [
        GradedSample(
            benchmark=benchmark,
            budget=sample.budget,
            number=sample.number,
            extraction=extraction,
            grade=known[program],
        )
        for sample, benchmark, extraction, program in _cells(item)
        if program in known
    ]
