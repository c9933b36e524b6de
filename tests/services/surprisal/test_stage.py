"""The stage with the shipped demo model: all is real."""

from __future__ import annotations

import pytest
from prometheus_client import REGISTRY

from asap.config import PruneConfig
from asap.errors import AsapError
from asap.types import Record, Triple
from asap_runtime.health import Probed
from asap_surprisal.settings import SurprisalSettings
from asap_surprisal.stage import SurprisalStage

COT = "First we add the numbers.\n\nWait, let me check.\n\nSo the sum is 7."


def observed(part):
    return REGISTRY.get_sample_value("asap_cot_tokens_count", {"part": part}) or 0


async def test_the_stage_is_ready_between_start_and_stop_and_prunes():
    stage = SurprisalStage(SurprisalSettings())
    assert isinstance(stage, Probed)
    with pytest.raises(AsapError, match="not loaded"):
        await stage.ready()
    await stage.start()
    await stage.ready()
    triple = Triple(question="What is 3 + 4?", cot=COT, answer="7")
    config = PruneConfig(method="asap_stage2", keep_ratio=0.7, max_tokens=None)
    before = [observed(part) for part in ("original", "coarse", "pruned")]
    done = await stage.process(Record(triple=triple, config=config))
    assert done.record.fine.removed
    after = [observed(part) for part in ("original", "coarse", "pruned")]
    assert after == [count + 1 for count in before]
    await stage.stop()
    for use in (stage.ready, lambda: stage.process(done.record)):
        with pytest.raises(AsapError) as caught:
            await use()
        assert caught.value.problem_code == "not-ready"


async def test_a_stage_that_never_started_stops():
    await SurprisalStage(SurprisalSettings()).stop()
