from __future__ import annotations

import pytest
from pydantic import ValidationError

from asap.config import PruneConfig
from asap.errors import InvalidInput
from asap.types import CoarseBlock, FineBlock, Record, StepScores, Triple, Usage


def make(**fields):
    return Triple(**{"question": "q", "cot": "a\n\nb\n\nc", "answer": "x", **fields})


def test_the_id_is_given_or_follows_from_the_content():
    assert make(id="mine").id == "mine"
    assert make().id == make(meta={"k": 1}).id != make(cot="b").id
    assert len(make().id) == 64


def test_unknown_fields_are_refused_and_values_are_frozen():
    with pytest.raises(ValidationError):
        make(prompt="x")
    with pytest.raises(ValidationError):
        make().cot = "y"


def test_control_tokens_are_refused():
    make().check()
    with pytest.raises(InvalidInput, match="'answer'"):
        make(answer="x </think>").check()


def test_record_round_trip_drops_and_restores_what_is_computed():
    scored = StepScores(
        scores={"first_token_surprisal": (0.5, None)}, tokens=(1, 1), tokens_joined=(2, 2), total=3
    )
    record = (
        Record(triple=make(), config=PruneConfig())
        .with_coarse(CoarseBlock(protocol="select", model="m", kept=(0, 2), status="accepted"))
        .with_fine(
            FineBlock(
                method="asap",
                scorer="s",
                tokenizer="t",
                max_tokens=1,
                kept=(1,),
                removed=(0,),
                scored=scored,
            )
        )
    )
    again = Record.model_validate_json(record.model_dump_json())
    assert again == record
    assert (again.pruned_cot, again.kept_steps, again.status) == ("c", (2,), "compressed")
    assert again.coarse_cot == "a\n\nc"


def test_a_block_is_validated_when_it_is_added():
    record = Record(triple=make(), config=PruneConfig())
    with pytest.raises(ValidationError):
        record.with_fine("not a block")


def test_usage_adds_up_and_knows_when_money_is_unknown():
    priced, free = Usage(calls=1, prompt_tokens=2, cost_usd=0.5), Usage(calls=1)
    assert (free + free).cost_usd is None
    assert priced + free + priced == Usage(calls=3, prompt_tokens=4, cost_usd=1.0)
