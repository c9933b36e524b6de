from __future__ import annotations

import io

import pytest
from rich.console import Console

from asap_cli.answers import Estimate, Evaluation, ItemProblem, Job, Model, Plan, StageCount
from asap_cli.tables import (
    estimate_table,
    facts_table,
    jobs_table,
    model_table,
    models_table,
    plan_table,
)

JOB = Job(
    id="j",
    phase="do\x1b[31mne",
    created_at=0.0,
    finished_at=2.5,
    total=3,
    counts=(
        StageCount(stage=None, status="failed", items=1),
        StageCount(stage="anchor", status="succeeded", items=2),
    ),
    config={"method": "asap", "max_tokens": 7, "protocol": "rewrite"},
    problems=(ItemProblem(code="c", detail="why [bold]\nso"),),
)


def said(table):
    stream = io.StringIO()
    Console(file=stream, width=120).print(table, highlight=False)
    return [" ".join(line.split()) for line in stream.getvalue().splitlines()]


def test_jobs_are_rows():
    head, row = said(jobs_table([JOB]))
    assert head == "id kind phase created done failed"
    assert row.startswith("j prune do␛[31mne ")
    assert row.endswith(" 3/3 1")


def test_a_jobs_facts_name_what_is_not_usual():
    lines = said(facts_table(JOB))
    assert lines[0] == "id j"
    assert any(line.startswith("finished ") and line.endswith("after 2.5 s") for line in lines)
    assert "config method=asap, max_tokens=7" in lines
    assert lines[-4:] == [
        "items 3", "no stage, failed 1", "anchor, succeeded 2", "problem c: why [bold] so"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("cost", "said_of_it"),
    [(1.5, "cost $1.5000"), (0.0, "cost $0.0000"), (None, "cost unknown: no prices are set")],
)
def test_an_estimate(cost, said_of_it):
    planned = Estimate(
        records=48,
        bad_lines=1,
        cot_tokens=12345,
        llm_calls=47,
        prompt_tokens=3,
        completion_tokens=4,
        scored_tokens=5,
        cost_usd=cost,
        tokenizer="t",
    )
    assert said(estimate_table(planned)) == [
        "records 48", "bad lines 1", "CoT tokens 12,345", "LLM calls 47", "LLM tokens in 3",
        "LLM tokens out 4", "scored tokens 5", said_of_it, "counted by t",
    ]  # fmt: skip


def test_what_another_kind_of_job_says_of_itself():
    state = {"model": "mine@3", "questions": 9, "generated": 7, "done": 4}
    job = JOB.model_copy(
        update={"kind": "evaluate", "config": {"limit": 2}, "evaluation": Evaluation(**state)}
    )
    lines = said(facts_table(job))
    assert "kind evaluate" in lines
    assert "config limit=2" in lines
    assert "model mine@3" in lines
    assert "questions 9, 7 generated, 4 done" in lines


def test_a_plan_is_told_in_the_servers_own_words():
    lines = said(plan_table(Plan({"samples": 1200, "tokenizer": "t\x1b", "data": {"a": 1}})))
    assert lines == ["samples 1,200", "tokenizer t\\u001b", 'data {"a": 1}']


def test_models_are_rows_and_one_is_its_facts():
    model = Model(
        name="mine", version=3, stage="production", base="demo", job_id="j",
        manifest_sha256="5" * 64, created_at=10.0, meta={"loss": 1.25},
    )  # fmt: skip
    head, row = said(models_table([model]))
    assert head == "model stage created base"
    assert row.startswith("mine@3 production ")
    lines = said(model_table(model))
    assert lines[0] == "model mine@3"
    assert "loss 1.25" in lines
