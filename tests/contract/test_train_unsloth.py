"""One contract for both backends: the same rows, recipe and loss, whoever trains. The real Unsloth,
each backend in a process of its own.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from asap.sft import IGNORED, learning_rate
from asap.train_config import TrainConfig
from asap_trainer.encoding import prepare
from training_runs import TINY, make_run, signals_itself, triples

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
BOTH = ["plain", pytest.param("unsloth", marks=pytest.mark.contract)]
TESTS = Path(__file__).parent.parent


def skip_without_unsloth():
    if find_spec("unsloth") is None:
        pytest.skip("Unsloth is not installed")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in triples()))
    return path


@pytest.fixture(scope="module")
def prepared(data, tiny_model_dir, tmp_path_factory):
    config = TrainConfig.model_validate({**TINY, "held_out_share": 0.25})
    return prepare([data], config, tiny_model_dir, tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def probe(data, tiny_model_dir):
    """What each backend says of itself, asked once."""
    answers: dict[str, dict] = {}

    def ask(backend):
        if backend == "unsloth":
            skip_without_unsloth()
        if backend not in answers:
            done = subprocess.run(
                [sys.executable, "training_probe.py", backend, str(tiny_model_dir), str(data)],
                cwd=TESTS,
                env={
                    **os.environ,
                    "PYTHONPATH": ".",
                    "OMP_NUM_THREADS": "1",
                    "HF_HUB_OFFLINE": "1",
                },
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr[-4000:]
            answers[backend] = json.loads(done.stdout)
        return answers[backend]

    return ask


@pytest.fixture(params=BOTH)
def found(request, probe):
    return probe(request.param)


def reference_loss(directory, examples):
    """Token-weighted, by hand: each sample alone through transformers."""
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(directory).eval()
    nats, count = 0.0, 0
    for example in examples:
        ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels[1:])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        nats += torch.nn.functional.cross_entropy(
            logits, labels, ignore_index=IGNORED, reduction="sum"
        ).item()
        count += int((labels != IGNORED).sum())
    return nats / count


def test_the_model_is_fed_the_prepared_rows_and_nothing_else(found, prepared):
    known = {tuple(one.input_ids): list(one.labels) for one in prepared.train}
    assert len(found["fed"]) == 2
    for batch in found["fed"]:
        [ids], [labels], [mask] = batch["input_ids"], batch["labels"], batch["attention_mask"]
        assert known[tuple(ids)] == labels
        assert mask == [1] * len(ids)
        assert labels[-1] == ids[-1]  # EOS carries loss
        assert labels[0] == IGNORED


def test_padding_is_told_by_position(found, prepared):
    known = {tuple(one.input_ids): list(one.labels) for one in prepared.train}
    batch = found["batched"]["fed"]
    rows = zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
    padded = 0
    for ids, labels, mask in rows:
        length = sum(mask)
        assert mask == [1] * length + [0] * (len(mask) - length)
        assert known[tuple(ids[:length])] == labels[:length]
        assert labels[length:] == [IGNORED] * (len(labels) - length)
        padded += len(ids) - length
    assert padded


def test_the_first_loss_is_that_of_all_tokens_alike(found, prepared, tiny_model_dir):
    expected = reference_loss(tiny_model_dir, prepared.train)
    for how in ("apart", "packed", "batched"):
        assert found[how]["rows"][0]["loss"] == pytest.approx(expected, rel=1e-5), how
    assert found["apart"]["passes"] == len(prepared.train)
    assert found["packed"]["passes"] < len(prepared.train) / 2


def test_packed_samples_give_the_gradients_of_the_same_ones_apart(found):
    for name in ("grad_norm", "tokens"):
        apart, packed = found["apart"]["rows"][0][name], found["packed"]["rows"][0][name]
        assert packed == pytest.approx(apart, rel=1e-4)
    assert found["packed"]["fed"]["position_ids"][0].count(0) > 1


def test_a_model_that_lets_packed_samples_see_each_other_is_refused(found):
    assert "see each other" in found["leak"]


def test_the_held_out_loss_is_that_of_all_tokens_alike(found, prepared, tiny_model_dir):
    before, after = found["held_out"]
    expected = reference_loss(tiny_model_dir, prepared.held_out)
    assert before == pytest.approx(expected, rel=1e-5)
    assert after < before


def test_every_step_has_the_rate_of_the_recipe(found):
    config = TrainConfig.model_validate(TINY)
    assert len(found["rows"]) == config.max_steps
    for row in found["rows"]:
        expected = learning_rate(row["step"] - 1, config.max_steps, config, config.learning_rate)
        assert row["learning_rate"] == pytest.approx(expected, abs=1e-12)


def test_the_loss_falls_and_no_figure_is_missing(found):
    rows = found["rows"]
    assert rows[-1]["loss"] < rows[0]["loss"] / 2
    for row in rows:
        assert all(math.isfinite(value) for value in row.values())
        assert 0 < row["loss_tokens"] < row["tokens"]


def test_bfloat16_and_checkpointing_change_the_loss_by_rounding_alone(found):
    exact = [row["loss"] for row in found["rows"][:2]]
    assert [row["loss"] for row in found["checkpointed"]] == pytest.approx(exact, rel=1e-5)
    rounded = [row["loss"] for row in found["bfloat16"]]
    assert rounded == pytest.approx(exact, rel=1e-2)
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert rounded != pytest.approx(exact, rel=1e-6)


@pytest.mark.contract
def test_both_backends_have_one_loss_curve(probe):
    curves = [[row["loss"] for row in probe(name)["rows"]] for name in ("plain", "unsloth")]
    # Rounding grows from step to step at such a rate; the curves begin at 11 nats.
    assert curves[0] == pytest.approx(curves[1], abs=0.05)
    assert curves[0][:5] == pytest.approx(curves[1][:5], rel=1e-5)


@pytest.mark.contract
def test_unsloth_goes_on_behind_a_kill_and_its_model_loads(tmp_path, tiny_model_dir):
    skip_without_unsloth()
    import transformers

    undisturbed = make_run(tmp_path / "one", tiny_model_dir, backend="unsloth")
    assert undisturbed.carry_out().returncode == 0
    run = make_run(tmp_path / "two", tiny_model_dir, backend="unsloth")
    killed = signals_itself("checkpoints/step-10/manifest.json", signal.SIGKILL, stored=True)
    assert run.carry_out(code=killed).returncode == -signal.SIGKILL
    assert run.carry_out().returncode == 0
    assert run.json("progress.json")["resumed_from"] == 10
    assert [row["loss"] for row in run.rows()] == pytest.approx(
        [row["loss"] for row in undisturbed.rows()], rel=1e-4
    )
    result = run.json("result.json")
    assert result["steps"] == 30
    assert "unsloth" in result["versions"]
    run.files.download_folder("model", tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.num_parameters() > 1e5
