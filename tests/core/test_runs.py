from __future__ import annotations

import pytest
from pydantic import ValidationError

from asap.runs import Launch, TrainProgress, TrainResult, TrainRun
from asap.train_config import TrainConfig

ID = "0123456789abcdef" * 2
RUN = TrainRun(
    id=ID,
    tenant="acme",
    config=TrainConfig(preset="demo"),
    base="demo",
    model="pruned",
    data=f"acme/runs/{ID}/data.jsonl",
    common_with=("acme/runs/other/data.jsonl",),
    meta={"method": "asap", "budget": 4096},
)
LAUNCH = Launch(launcher="kubernetes", name="asap-train-0", attempt=1)
PROGRESS = TrainProgress(phase="training", step=3, total_steps=10, dropped={"too-long": 2})
RESULT = TrainResult(
    model_sha256="0" * 64,
    steps=10,
    samples=98,
    held_out=5,
    dropped={"too-long": 2},
    tokens_per_sample=900.5,
    response_tokens_per_sample=700.25,
    tokens_per_step=14408.0,
    step_seconds=1.5,
    seconds=15.0,
    loss_first=2.0,
    loss_last=1.0,
    data_sha256="1" * 64,
    template="deepseek-r1",
    base="demo",
    device="cpu",
    versions={"torch": "2.13.0"},
)


def test_a_run_travels_as_json_with_all_that_it_holds():
    run = RUN.grown(launch=LAUNCH, progress=PROGRESS, result=RESULT)
    assert TrainRun.model_validate_json(run.model_dump_json()) == run
    assert run.model_dump(mode="json")["kind"] == "train"


def test_a_run_lies_below_its_tenant():
    assert RUN.prefix == f"acme/runs/{ID}"


def test_growing_gives_a_copy_and_keeps_the_rest():
    grown = RUN.grown(launch=LAUNCH).grown(progress=PROGRESS)
    assert (grown.launch, grown.progress, grown.result) == (LAUNCH, PROGRESS, None)
    assert (RUN.launch, RUN.progress) == (None, None)
    assert grown.grown(launch=None, progress=None) == RUN


@pytest.mark.parametrize(
    "fields",
    [
        {"progress": {"phase": "resting"}},
        {"launch": {"launcher": "cron", "name": "x", "attempt": 0}},
        {"id": "short"},
        {"state": "running"},
    ],
)
def test_growing_checks_what_is_added(fields):
    with pytest.raises(ValidationError):
        RUN.grown(**fields)


@pytest.mark.parametrize(
    "id_", ["", "0" * 31, "0" * 33, "A" * 32, "../" + "0" * 29, "0" * 32 + "\n"]
)
def test_an_id_is_fit_for_a_folder_name(id_):
    with pytest.raises(ValidationError):
        RUN.grown(id=id_)


def test_a_run_of_another_version_is_refused():
    fields = RUN.model_dump(mode="json")
    for name, value in (("version", 2), ("kind", "evaluate")):
        with pytest.raises(ValidationError):
            TrainRun.model_validate({**fields, name: value})


def test_progress_is_empty_at_the_start():
    start = TrainProgress()
    assert (start.phase, start.step, start.loss, start.dropped) == ("starting", 0, None, {})
    assert TrainProgress().dropped is not start.dropped
