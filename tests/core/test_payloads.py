"""What an item may be: told apart by kind, and sent on its route."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from asap.config import PruneConfig
from asap.eval_config import EvalConfig
from asap.eval_items import EvalItem
from asap.methods import METHODS
from asap.payloads import read_payload, route_of
from asap.problems import ProblemRef
from asap.runs import TrainRun
from asap.train_config import TrainConfig
from asap.types import Record, Triple

RECORD = Record(triple=Triple(question="q", cot="a\n\nb", answer="x"), config=PruneConfig())
RUN = TrainRun(
    id="0" * 32, tenant="t", config=TrainConfig(), base="b", model="m", data="t/sets/x.jsonl"
)
ASKED = EvalItem(
    id="0" * 32, tenant="t", config=EvalConfig(), model="m@1",
    problems=(ProblemRef(benchmark="b", task_id="1", prompt="p", sha256="0" * 64, key="t/x"),),
)  # fmt: skip


@pytest.mark.parametrize("payload", [RECORD, RUN, ASKED], ids=["record", "run", "asked"])
def test_a_payload_comes_back_as_it_was_stored(payload):
    again = read_payload(payload.model_dump_json().encode())
    assert type(again) is type(payload)
    assert again == payload


WRITTEN = Path(__file__).with_name("rows_0_1_0.jsonl").read_text().splitlines()
"""Rows as release 0.1.0 wrote them, far on their ways. Never edited: an update finds such rows, and
the workers of that release, beside its own.
"""


def holds(value, old):
    """Whether all of the old value is there; there may be more."""
    if isinstance(old, dict):
        return all(name in value and holds(value[name], part) for name, part in old.items())
    if isinstance(old, list):
        return len(value) == len(old) and all(map(holds, value, old))
    return value == old


def test_rows_of_the_first_release_are_read_and_lose_nothing():
    payloads = [read_payload(line.encode()) for line in WRITTEN]
    assert [type(payload) for payload in payloads] == [Record, TrainRun, EvalItem]
    for line, payload in zip(WRITTEN, payloads, strict=True):
        assert holds(json.loads(payload.model_dump_json()), json.loads(line))


@pytest.mark.parametrize("stored", [b'{"kind": "bake"}', b"[]", b"{}", b"no JSON", b'{"kind": 1}'])
def test_what_is_no_payload_is_refused(stored):
    with pytest.raises(ValidationError):
        read_payload(stored)


def test_a_run_is_not_taken_for_a_record_nor_the_other_way_round():
    as_record = RUN.model_dump_json().replace('"kind":"train",', "")
    as_run = RECORD.model_dump_json().replace("{", '{"kind":"train",', 1)
    for stored in (as_record, as_run):
        with pytest.raises(ValidationError):
            read_payload(stored.encode())


@pytest.mark.parametrize("method", METHODS)
def test_the_route_of_a_record_is_that_of_its_method(method):
    record = Record(triple=RECORD.triple, config=PruneConfig(method=method))
    assert route_of(record) == METHODS[method].stages


def test_a_run_visits_the_trainer():
    assert route_of(RUN) == ("trainer",)


def test_what_is_asked_is_generated_then_graded():
    assert route_of(ASKED) == ("generate", "grade")
