"""An evaluation without model and sandbox: benchmarks made here, scripted answers and grades."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from asap.errors import UpstreamError
from asap.eval_items import GradedSample
from asap.grades import Grade
from asap.problems import Sample
from asap_runtime.stage import Done, Wait
from waiting import PATIENCE_S

EVALUATE = {"kind": "evaluate", "model": "slow", "config": {"budgets": [64, 128]}}
EARLY = {"HumanEval/0", "HumanEval/1"}
"""Tasks that are answered while the stage is held up: three questions of the default benchmarks."""


def human_eval(task_id: str, prompt: str | None = None, padding: int = 0) -> dict[str, str]:
    """A record in the form of HumanEval; its tests have at least `padding` characters."""
    return {
        "task_id": task_id,
        "prompt": prompt or f"def f():\n    return {task_id!r}\n",
        "entry_point": "f",
        "canonical_solution": "    pass\n",
        "test": f"def check(candidate):\n    assert candidate()  # {'x' * padding}\n",
    }


def write_benchmarks(folder: Path) -> Path:
    """Four tasks of HumanEval, two of HumanEval+ with one question in common, own data."""
    tasks = [human_eval(f"HumanEval/{n}") for n in range(4)]
    plus = [tasks[0], human_eval("HumanEval/1", "def f():\n    'Another question.'\n")]
    folder.mkdir()
    for name, rows in (
        ("HumanEval.jsonl", tasks),
        ("HumanEvalPlus.jsonl", plus),
        ("mine.jsonl", [human_eval("large", padding=300_000), human_eval("small")]),
    ):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class ScriptedEvaluator:
    """The stage `generate` as the gateway sees it. The longer the budget the more tokens, and the
    tokens of a model are its own.
    """

    name, concurrency = "generate", 8

    def __init__(self) -> None:
        self.go = asyncio.Event()
        """Unless it is set, only the tasks of `EARLY` are answered."""
        self.go.set()
        self.tokens = {"slow": 100}
        """Of a model's completion, at most; 50 where it is not named."""
        self.wrong = {"HumanEval/2"}
        self.broken: set[str] = set()

    async def start(self) -> None:
        """Nothing to load."""

    async def process(self, item):
        task = item.problems[0].task_id
        if not self.go.is_set() and task not in EARLY:
            return Wait(item, 0.02)
        if task in self.broken:
            raise UpstreamError("the server answered nonsense")
        return Done(item.grown(samples=[
            self._sample(item, task, budget, number)
            for budget in item.budgets
            for number in range(item.config.samples)
        ], engine={"vllm": "0"}))  # fmt: skip

    def _sample(self, item, task, budget, number):
        tokens = min(budget, self.tokens.get(item.model, 50) + len(task))
        return Sample(
            task_id=task, number=number, budget=budget, text="SECRET completion",
            completion_tokens=tokens, prompt_tokens=9, finish_reason="stop", started_at=1.0,
            seconds=2.0,
        )  # fmt: skip

    async def stop(self) -> None:
        """Nothing to let go."""


class ScriptedGrader:
    """The stage `grade`: everything passes but what the evaluator calls wrong."""

    name, concurrency = "grade", 8

    def __init__(self, evaluator: ScriptedEvaluator) -> None:
        self.evaluator = evaluator

    async def start(self) -> None:
        """Nothing to load."""

    async def process(self, item):
        return Done(item.grown(grades=[
            GradedSample(
                benchmark=problem.benchmark, budget=sample.budget, number=sample.number,
                extraction=extraction, grade=self._grade(problem),
            )
            for sample in item.samples
            for problem in item.problems
            for extraction in item.config.extractions
        ], sandbox={"level": "scripted"}))  # fmt: skip

    def _grade(self, problem):
        return Grade(verdict="wrong" if problem.task_id in self.evaluator.wrong else "passed")

    async def stop(self) -> None:
        """Nothing to let go."""


async def until(client, job, *phases):
    """The job in one of the phases; when it is an ended evaluation, with its figures."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            state = (await client.get(f"/jobs/{job}")).json()
            told, final = state["evaluation"], state["phase"] in ("done", "cancelled")
            if state["phase"] in phases and not (told and final and told["figures"] is None):
                return state
            await asyncio.sleep(0.02)


async def until_done(client, job, questions):
    async with asyncio.timeout(PATIENCE_S):
        while True:
            state = (await client.get(f"/jobs/{job}")).json()
            if (state["evaluation"] or {}).get("done") == questions:
                return state
            await asyncio.sleep(0.02)


async def submit(client, **fields):
    answer = await client.post("/jobs", json={**EVALUATE, **fields})
    assert answer.status_code == 202, answer.text
    assert answer.headers["Location"] == f"/jobs/{answer.json()['id']}"
    return answer.json()["id"]
