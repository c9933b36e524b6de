from __future__ import annotations

import pytest

from asap.errors import InvalidInput
from asap.methods import METHODS, get_method


def test_the_table_holds_the_paper_its_ablations_and_the_baselines():
    routes = {name: row.stages for name, row in METHODS.items()}
    assert routes == {
        "asap": ("anchor", "surprisal"),
        "asap_stage1": ("anchor",),
        "asap_stage2": ("surprisal",),
        "direct": ("anchor",),
        "random": ("surprisal",),
        "truncate": ("surprisal",),
        "original": (),
    }


def test_every_method_of_the_surprisal_stage_ranks_steps():
    assert all(
        (row.importance is not None) == ("surprisal" in row.stages) for row in METHODS.values()
    )


def test_an_unknown_method_gets_the_nearest_name():
    with pytest.raises(InvalidInput, match="did you mean 'truncate'") as caught:
        get_method("truncatee")
    assert caught.value.problem_code == "unknown-method"
