"""The stage with the shipped demo model: all is real. With vLLM: the contract test."""

from __future__ import annotations

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from prometheus_client import REGISTRY

from asap.config import PruneConfig
from asap.errors import AsapError, Misconfigured, UpstreamUnavailable
from asap.types import Record, Triple
from asap_runtime.health import Probed
from asap_runtime.settings import load_settings
from asap_runtime.stage import Wait
from asap_surprisal.settings import SurprisalSettings
from asap_surprisal.stage import SurprisalStage
from scoring import STEPS, request_of

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
    assert done.payload.fine.removed
    after = [observed(part) for part in ("original", "coarse", "pruned")]
    assert after == [count + 1 for count in before]
    await stage.stop()
    for use in (stage.ready, lambda: stage.process(done.payload)):
        with pytest.raises(AsapError) as caught:
            await use()
        assert caught.value.problem_code == "not-ready"


async def test_the_engine_decides_how_much_a_batch_and_a_text_may_hold(tiny_model_dir):
    stage = SurprisalStage(SurprisalSettings(surprisal={"model": str(tiny_model_dir)}))
    await stage.start()
    assert stage.scorer.max_batch_tokens == 4096  # what speed asks of a CPU
    assert await stage.scorer.score_or_refuse([request_of(*STEPS * 700)])  # in windows
    await stage.stop()
    fixed = SurprisalSettings(surprisal={"model": str(tiny_model_dir), "max_batch_tokens": 512})
    stage = SurprisalStage(fixed)
    await stage.start()
    assert stage.scorer.max_batch_tokens == 512
    with pytest.raises(AsapError) as refused:  # the window is 2,048 and nobody vouches for more
        await stage.scorer.score_or_refuse([request_of(*STEPS * 10)])
    assert refused.value.problem_code == "text-too-long"
    await stage.stop()


@pytest.mark.parametrize(("precision", "same"), [("float32", True), ("fp8", False)])
async def test_the_precision_of_the_settings_is_that_of_the_model(tiny_model_dir, precision, same):
    scored = []
    for one in ("auto", precision):
        group = {"model": str(tiny_model_dir), "device": "cpu", "precision": one}
        stage = SurprisalStage(SurprisalSettings(surprisal=group))
        await stage.start()
        scored += await stage.scorer.score([request_of()])
        await stage.stop()
    assert (scored[0].scores == scored[1].scores) == same


async def test_the_figures_of_the_device_are_exported(tiny_model_dir):
    stage = SurprisalStage(SurprisalSettings(surprisal={"model": str(tiny_model_dir)}))
    await stage.start()
    before = REGISTRY.get_sample_value("asap_score_steps_total")
    await stage.scorer.score([request_of()])
    assert REGISTRY.get_sample_value("asap_score_steps_total") == before + len(STEPS)
    assert REGISTRY.get_sample_value("asap_score_peak_rate") > 0
    await stage.stop()


VLLM = {"backend": "vllm", "model": "m", "base_url": "http://127.0.0.1:9/v1"}


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ({**VLLM, "base_url": None}, "needs base_url"),
        ({**VLLM, "model": "demo"}, "needs model"),
        ({**VLLM, "device": "cpu"}, "vllm does not use device"),
        ({**VLLM, "precision": "fp8"}, "vllm does not use precision"),
        ({**VLLM, "max_batch_tokens": 512}, "vllm does not use max_batch_tokens"),
        ({"base_url": "http://127.0.0.1:9/v1"}, "torch does not use base_url"),
        ({"served_model": "m"}, "torch does not use served_model"),
        ({"api_key": "planted"}, "torch does not use api_key"),
        ({"max_batch_tokens": 15}, "MAX_BATCH_TOKENS: .*at least 16"),
        ({"max_batch_tokens": "planted"}, "MAX_BATCH_TOKENS: .*`auto`"),
        ({"max_batch_tokens": True}, "MAX_BATCH_TOKENS: .*`auto`"),
    ],
)
def test_settings_that_cannot_work_are_found_at_the_start(group, words):
    with pytest.raises(Misconfigured, match=words) as caught:
        load_settings(SurprisalSettings, surprisal=group)
    assert "planted" not in caught.value.detail


def test_settings_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("ASAP_SURPRISAL__MAX_BATCH_TOKENS", "512")
    assert load_settings(SurprisalSettings).surprisal.max_batch_tokens == 512
    monkeypatch.setenv("ASAP_SURPRISAL__MAX_BATCH_TOKENS", "auto")
    assert load_settings(SurprisalSettings) == SurprisalSettings()
    for name, value in {**VLLM, "api_key": "planted", "max_batch_tokens": "auto"}.items():
        monkeypatch.setenv(f"ASAP_SURPRISAL__{name.upper()}", value)
    settings = load_settings(SurprisalSettings)
    assert settings.surprisal.api_key.get_secret_value() == "planted"
    assert "planted" not in repr(settings)


async def test_a_server_that_is_not_there_is_found_at_the_start(tiny_model_dir):
    stage = SurprisalStage(SurprisalSettings(surprisal={**VLLM, "model": str(tiny_model_dir)}))
    with pytest.raises(UpstreamUnavailable):
        await stage.start()
    await stage.stop()


@pytest.mark.parametrize("away", ["gone", 503])
async def test_records_wait_for_a_server_that_is_away_and_burn_no_attempt(tiny_model_dir, away):
    async def models(http):
        return web.json_response({"data": [{"id": "m", "max_model_len": 1000}]})

    async def complete(http):
        return web.Response(status=503)

    app = web.Application()
    app.add_routes([web.get("/v1/models", models), web.post("/v1/completions", complete)])
    server = TestServer(app)
    await server.start_server()
    there = {"base_url": str(server.make_url("/v1")), "model": str(tiny_model_dir)}
    group = {"backend": "vllm", "served_model": "m", **there}
    stage = SurprisalStage(SurprisalSettings(surprisal=group))
    await stage.start()
    if away == "gone":
        await server.close()
    config = PruneConfig(method="asap_stage2", max_tokens=1)
    record = Record(triple=Triple(question="q", cot=COT, answer="7"), config=config)
    waiting = await stage.process(record)
    assert isinstance(waiting, Wait)
    assert waiting.payload == record
    assert 30 <= waiting.seconds <= 36
    await stage.stop()
    await server.close()


async def test_a_stage_that_never_started_stops():
    await SurprisalStage(SurprisalSettings()).stop()
