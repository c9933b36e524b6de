"""Which model a worker serves, and which items wait for another one."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from asap.errors import AsapError, CapacityError, InvalidInput, UpstreamUnavailable
from asap.eval_config import EvalConfig
from asap_evaluator import server as server_module
from asap_evaluator import serving as module
from asap_evaluator.model_cache import ModelCache, ModelSource
from asap_evaluator.server import VllmServer
from asap_evaluator.serving import GivenServing, OwnServing, vllm_options
from asap_evaluator.sessions import ended, leader, signal_all
from asap_evaluator.settings import EvaluatorSettings, VllmSettings
from asap_runtime.blobs import BlobStore
from fake_vllm import FakeVllm, Say
from vllm_program import program, starts
from waiting import until


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(server_module, "LOOK_S", 0.05)
    monkeypatch.setattr(module, "IDLE_S", 3600.0)  # no model is idle because the machine is busy


@pytest.fixture
def vllm(tmp_path):
    """An executable that stands for vLLM."""
    path = tmp_path / "vllm"
    python, script = program()
    path.write_text(f'#!/bin/sh\nexec {python} {script} "$@"\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def models(tiny_model_dir, tmp_path):
    """Makes models by name, which say how their servers behave."""

    def make(name: str, **behaviour: object) -> ModelSource:
        folder = tmp_path / "models" / name
        if not folder.exists():
            shutil.copytree(tiny_model_dir, folder)
        (folder / "behaviour.json").write_text(json.dumps(behaviour))
        return ModelSource(str(folder))

    return make


@pytest.fixture
def servings(tmp_path, vllm):
    made = []

    def make(**own: object) -> OwnServing:
        values = {"models": tmp_path / "models", "vllm": {"program": vllm, "device": "cpu"}, **own}
        settings = EvaluatorSettings(home=tmp_path / "home", evaluator=values)
        cache = ModelCache(
            tmp_path / "fetched",
            BlobStore.in_folder(tmp_path / "blobs"),
            allowed=settings.evaluator.models,
        )
        kind = OwnServing if settings.evaluator.base_url is None else GivenServing
        made.append(kind(settings, cache))
        return made[-1]

    make.folder = tmp_path / "home" / "evaluator"
    yield make
    for line in (line for folder in make.folder.glob("vllm-*") for line in starts(folder)):
        for pid in line["pids"]:
            signal_all(leader(pid), signal.SIGKILL)


@pytest.fixture
async def serving(servings):
    serving = servings()
    yield serving
    await serving.close()


def dead(pids: list[int]) -> bool:
    return all(ended(leader(pid)) for pid in pids)


async def ask(serving, model: ModelSource) -> str:
    async with serving.use(model) as generator:
        sample = await generator.sample((1, 2), EvalConfig(), task_id="t", budget=9, number=0)
    return sample.text


async def test_items_of_one_model_share_a_server_that_their_first_one_starts(
    serving, servings, models
):
    await serving.ready()
    a = models("a", tokens=["said ", "by a"])
    assert await asyncio.gather(*(ask(serving, a) for _ in range(5))) == ["said by a"] * 5
    assert len(starts(servings.folder / "vllm-0")) == 1
    await serving.ready()
    await serving.close()
    assert dead(starts(servings.folder / "vllm-0")[0]["pids"])


async def test_items_of_another_model_wait_while_one_is_used_or_was_a_moment_ago(serving, models):
    a, b = models("a"), models("b")
    async with serving.use(a):
        with pytest.raises(CapacityError, match="another model is served") as caught:
            await ask(serving, b)
        assert caught.value.problem_code == "not-ready"
    with pytest.raises(CapacityError):
        await ask(serving, b)
    assert await ask(serving, a) == "hello"


async def test_an_idle_model_gives_its_place_away(serving, servings, models, monkeypatch):
    monkeypatch.setattr(module, "IDLE_S", 0.0)
    a, b = models("a", tokens=["by a"]), models("b", tokens=["by b"])
    assert await ask(serving, a) == "by a"
    assert await ask(serving, b) == "by b"
    first, second = starts(servings.folder / "vllm-0")
    assert dead(first["pids"])
    assert str(second["args"][1]).endswith("/b")


async def test_after_its_turn_a_model_takes_no_new_items_until_the_other_had_its_own(
    serving, models, monkeypatch
):
    monkeypatch.setattr(module, "TURN_S", 0.0)
    a, b = models("a"), models("b", tokens=["by b"])
    async with serving.use(a):
        with pytest.raises(CapacityError):
            await ask(serving, b)
        with pytest.raises(CapacityError, match="another model has its turn"):
            await ask(serving, a)
    monkeypatch.setattr(module, "IDLE_S", 0.0)
    assert await ask(serving, b) == "by b"
    assert await ask(serving, a) == "hello", "nobody asked for b meanwhile"


async def test_a_turn_that_nobody_waits_for_any_more_is_forgotten(serving, models, monkeypatch):
    monkeypatch.setattr(module, "TURN_S", 0.0)
    monkeypatch.setattr(module, "FORGET_S", 0.0)
    a, b = models("a"), models("b")
    async with serving.use(a):
        with pytest.raises(CapacityError):
            await ask(serving, b)
        await asyncio.sleep(0.01)
        assert await ask(serving, a) == "hello"


async def test_a_model_that_cannot_be_served_is_tried_once_in_a_while_and_blocks_no_other(
    serving, servings, models, monkeypatch
):
    broken, good = models("broken", exit=3), models("good")
    results = await asyncio.gather(
        *(ask(serving, broken) for _ in range(3)), return_exceptions=True
    )
    assert {type(result) for result in results} == {UpstreamUnavailable}
    with pytest.raises(UpstreamUnavailable) as caught:
        await ask(serving, broken)
    assert caught.value.context["retry_after_s"] > 0
    assert len(starts(servings.folder / "vllm-0")) == 1, "not for each item anew"
    assert await ask(serving, good) == "hello"
    monkeypatch.setattr(module, "IDLE_S", 0.0)
    monkeypatch.setattr(module, "RETRY_S", 0.0)
    models("broken")
    assert await ask(serving, broken) == "hello"


async def test_a_model_that_is_none_fails_by_what_is_wrong_with_it(serving, models, tmp_path):
    with pytest.raises(InvalidInput):
        await ask(serving, ModelSource("/etc"))
    a = models("a")
    (Path(a.name) / "tokenizer.json").unlink()
    with pytest.raises(AsapError, match="tokenizer") as caught:
        await ask(serving, a)
    assert not caught.value.retryable


async def test_while_a_dead_server_is_started_anew_items_wait(serving, servings, models):
    a = models("a")
    assert await ask(serving, a) == "hello"
    models("a", healthy=False)
    os.kill(starts(servings.folder / "vllm-0")[0]["pids"][0], signal.SIGKILL)
    await until(lambda: not serving._server.up)
    with pytest.raises(CapacityError, match="started anew"):
        await ask(serving, a)
    with pytest.raises(CapacityError, match="not healthy"):
        await serving.ready()


async def test_what_killed_workers_have_left_is_taken_over_or_ended(servings, models):
    a, b = models("a"), models("b")
    left, workers = [], []
    for number, model in enumerate((b, a, a)):
        options = vllm_options(servings()._settings.evaluator.vllm, Path(model.name))
        server = VllmServer(options, servings.folder / f"vllm-{number}")
        await server.start()
        server._lock.close()  # as the end of its process does
        workers.append(server)
        left.append(starts(servings.folder / f"vllm-{number}")[0]["pids"])
    serving = servings()
    assert await ask(serving, a) == "hello"
    assert [dead(pids) for pids in left] == [True, False, True]
    assert all(len(starts(servings.folder / f"vllm-{n}")) == 1 for n in range(3))
    await serving.close()
    assert dead(left[1])
    for server in workers:
        server._process.wait()


async def test_two_workers_of_a_machine_have_a_server_each(servings, models):
    a = models("a")
    first, second = servings(), servings()
    assert await ask(first, a) == await ask(second, a) == "hello"
    assert await ask(first, a) == "hello", "the second has not ended the first one's"
    assert len(starts(servings.folder / "vllm-1")) == 1
    await first.close()
    await second.close()


async def test_leaving_while_a_server_starts_leaves_nothing(servings, models):
    serving = servings()
    asking = asyncio.create_task(ask(serving, models("a", healthy=False)))
    log = servings.folder / "vllm-0" / "starts.jsonl"
    await until(lambda: log.exists() and log.read_text().endswith("\n"))
    await serving.close()
    with pytest.raises((asyncio.CancelledError, AsapError)):
        await asking
    assert dead(starts(servings.folder / "vllm-0")[0]["pids"])


async def test_a_server_that_was_given_is_asked_under_its_own_name(servings, tiny_model_dir):
    with FakeVllm(model="theirs", script=[Say("hello")]) as server:
        own = {"base_url": f"{server.url}/v1", "served_model": "theirs", "vllm": {}}
        serving = servings(**own, tokenizer=str(tiny_model_dir))
        await serving.ready()
        assert await ask(serving, ModelSource("anything")) == "hello"
        assert await ask(serving, ModelSource("anything")) == "hello"
        assert {sent["model"] for sent in server.asked("/v1/completions")} == {"theirs"}
        server.healthy = False
        with pytest.raises(CapacityError, match="does not answer"):
            await serving.ready()
        await serving.close()


async def test_a_given_server_that_is_away_lets_items_wait(servings, tiny_model_dir):
    serving = servings(base_url="http://127.0.0.1:9/v1", tokenizer=str(tiny_model_dir), vllm={})
    for call in (ask(serving, ModelSource("m")), serving.ready()):
        with pytest.raises(CapacityError) as caught:
            await call
        assert caught.value.problem_code == "not-ready"
    await serving.close()


def test_a_server_for_evaluations_caches_no_prefixes_and_has_no_sampling_of_its_own(tmp_path):
    args = vllm_options(VllmSettings(device="gpu"), tmp_path).args
    assert "--no-enable-prefix-caching" in args
    assert args[args.index("--generation-config") + 1] == "vllm"
    assert args[args.index("--dtype") + 1] == "bfloat16"
    assert args[args.index("--gpu-memory-utilization") + 1] == "0.9"
    assert "--enforce-eager" not in args


def test_a_server_on_the_cpu_and_further_arguments(tmp_path):
    settings = VllmSettings(device="cpu", max_model_len=512, cpu_kv_cache_gib=3, args=("--x=1",))
    options = vllm_options(settings, tmp_path)
    assert "--enforce-eager" in options.args
    assert "--gpu-memory-utilization" not in options.args
    assert options.args[-3:] == ("--max-model-len", "512", "--x=1")
    assert options.environment["VLLM_CPU_KVCACHE_SPACE"] == "3"
