"""From two questions to a report with the real vLLM, started by the stage, and the real sandbox."""

from __future__ import annotations

import asyncio
import random

import pytest
import pytest_asyncio

from asap.errors import CapacityError, InvalidInput
from asap.eval_config import EvalConfig
from asap.eval_items import EvalItem
from asap.metrics import results_of
from asap.payloads import read_payload
from asap.problems import Problem
from asap.report import build_report
from asap_evaluator.model_cache import ModelSource
from asap_evaluator.settings import EvaluatorSettings
from asap_evaluator.stage import GenerateStage, GradeStage
from asap_runtime.blobs import BlobStore
from asap_runtime.run_files import RunFiles
from asap_runtime.stage import Done
from engines.vllm_server import missing

pytestmark = [
    pytest.mark.contract,
    pytest.mark.slow,
    pytest.mark.timeout(420),
    pytest.mark.asyncio(loop_scope="module"),  # all share one server
]

BUDGETS = (8, 48)
TASKS = {
    "HumanEval/0": ("add(a, b)", "assert candidate(1, 2) == 3"),
    "HumanEval/1": ("double(a)", "assert candidate(4) == 8"),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stages(tiny_model_dir, tmp_path_factory):
    """Both stages, on a model as a training run leaves it in the registry; one start of vLLM."""
    if reason := missing():
        pytest.skip(reason)
    home = tmp_path_factory.mktemp("home")
    blobs = BlobStore.in_folder(home / "blobs")
    sha256 = RunFiles(blobs, "t/runs/1").upload_folder(tiny_model_dir, "model")
    own = {"vllm": {"device": "cpu"}, "grade_concurrency": 1, "reference_cpu_s": 10.0}
    settings = EvaluatorSettings(home=home, evaluator=own)
    generating, grading = GenerateStage(settings, blobs=blobs), GradeStage(settings, blobs=blobs)
    await generating.start()
    await grading.start()
    try:
        await grading.ready()
    except CapacityError as refusal:
        pytest.skip(refusal.detail)
    yield generating, grading, ModelSource("tiny@1", "t/runs/1/model", sha256)
    await generating.stop()
    await grading.stop()


def item_of(model: ModelSource, task_id: str, **fields: object) -> EvalItem:
    head, test = TASKS[task_id]
    problem = Problem(
        benchmark="humaneval", task_id=task_id, prompt=f"Complete def {head}:", kind="asserts",
        entry_point=head.partition("(")[0], test=f"def check(candidate):\n    {test}",
        time_limit_s=3.0,
    )  # fmt: skip
    values = {"template": "deepseek-r1", "budgets": BUDGETS}
    config = EvalConfig(benchmarks=("humaneval",), **values)
    return EvalItem(
        id="0" * 32, tenant="t", config=config, model=model.name, model_prefix=model.prefix,
        model_sha256=model.sha256, problems=(problem,), **fields,
    )  # fmt: skip


async def through(item: EvalItem, *stages) -> EvalItem:
    for stage in stages:
        result = None
        while not isinstance(result, Done):
            result = await stage.process(item)
            item = read_payload(result.payload.model_dump_json().encode())
    return item


def scores(items: list[EvalItem]) -> list[tuple]:
    """What a report says without times."""
    report = build_report({"m": [r for item in items for r in results_of(item)]})
    return [(r.budget, r.extraction, r.tokens, r.truncated, r.accuracy) for r in report.rows]


async def test_two_questions_at_two_budgets_come_to_a_report(stages):
    generating, grading, model = stages
    asked = [item_of(model, task) for task in TASKS]
    done = await asyncio.gather(*(through(item, generating, grading) for item in asked))
    await generating.ready()
    for item in done:
        assert [sample.budget for sample in item.samples] == list(BUDGETS)
        for sample in item.samples:
            assert 0 < sample.completion_tokens <= sample.budget
            assert sample.truncated == (sample.completion_tokens == sample.budget)
            assert 0 < sample.ttft_s <= sample.seconds
            assert 0 <= sample.reasoning_tokens <= sample.completion_tokens
        assert len(item.grades) == 4
        assert all(grade.grade.scored for grade in item.grades)
        strict = [g.grade.verdict for g in item.grades if g.extraction == "strict"]
        assert set(strict) == {"no-code"}, "a random model's thinking never ends"
    report = build_report({"tiny": [r for item in done for r in results_of(item)]})
    assert [(row.budget, row.tasks) for row in report.rows] == [(8, 2), (48, 2)] * 2
    assert all(row.latency_batch_s > 0 for row in report.rows)

    # The same again: shuffled, one sample at hand, one item already through.
    other = item_of(model, "HumanEval/1", samples=done[1].samples[1:])
    again = [done[0].grown(grades=()), other]
    for item in random.sample(again, 2):
        again[again.index(item)] = await through(item, generating, grading)
    assert scores(again) == scores(done)


async def test_our_template_and_the_servers_own_are_the_same_prompt(stages):
    generating, _, model = stages
    async with generating._serving.use(model) as generator:
        ours = await generator.prompt("What is 1 + 2?", "deepseek-r1")
        assert await generator.prompt("What is 1 + 2?", "server") == ours


async def test_a_budget_beyond_the_window_is_refused_with_its_reason(stages):
    generating, _, model = stages
    item = item_of(model, "HumanEval/0")
    config = item.config.model_copy(update={"budgets": (4096,)})
    with pytest.raises(InvalidInput, match="window of 2048"):
        await generating.process(item.grown(config=config))


async def test_sampled_completions_differ_by_number_and_repeat_by_seed(stages):
    generating, _, model = stages
    item = item_of(model, "HumanEval/0")
    values = {"temperature": 1.0, "samples": 3, "budgets": (24,), "seed": 3}
    item = item.grown(config=item.config.model_copy(update=values))
    first, second = [await through(item, generating) for _ in range(2)]
    texts = [sample.text for sample in first.samples]
    assert len(set(texts)) == 3
    assert texts == [sample.text for sample in second.samples]
