"""The folder of a trained model: tokenizer untouched, template ours, a card with the figures."""

from __future__ import annotations

import importlib.metadata
import json
import shutil

import pytest

from asap.runs import TrainResult, TrainRun
from asap.sft import TEMPLATES
from asap.train_config import TrainConfig
from asap_trainer.model_card import complete_folder, library_versions, write_card

TEMPLATE = TEMPLATES["deepseek-r1"]
RUN = TrainRun(
    id="0" * 32,
    tenant="acme",
    config=TrainConfig(preset="demo"),
    base="demo",
    model="short-thinker",
    data="acme/runs/x/data.jsonl",
)


@pytest.fixture
def folder(tiny_model_dir, tmp_path):
    saved = tmp_path / "model"
    saved.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(tiny_model_dir / name, saved / name)
    for name in ("training_args.bin", "chat_template.jinja", "tokenizer.json", "vocab.json"):
        (saved / name).write_text("of the library")
    complete_folder(saved, tiny_model_dir, TEMPLATE, RUN)
    return saved


def test_the_tokenizer_is_the_base_models_byte_for_byte(folder, tiny_model_dir):
    assert (folder / "tokenizer.json").read_bytes() == (
        tiny_model_dir / "tokenizer.json"
    ).read_bytes()
    names = {path.name for path in folder.iterdir()}
    assert not names & {"training_args.bin", "chat_template.jinja", "vocab.json"}


def test_the_chat_template_is_the_trained_one(folder, tiny_model_dir):
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    before = json.loads((tiny_model_dir / "tokenizer_config.json").read_text("utf-8"))
    assert settings == {**before, "chat_template": TEMPLATE.jinja()}


def test_generation_ends_where_the_training_string_does(folder, tiny_model_dir):
    eos = json.loads((tiny_model_dir / "config.json").read_text())["eos_token_id"]
    for name in ("config.json", "generation_config.json"):
        assert json.loads((folder / name).read_text())["eos_token_id"] == eos


def test_the_run_is_kept(folder):
    assert TrainRun.model_validate_json((folder / "run.json").read_text()) == RUN


@pytest.mark.parametrize("held_out", [(None, None), (2.5, 1.25)])
def test_the_card_says_how_it_was_made(folder, held_out):
    result = TrainResult(
        model_sha256="",
        steps=200,
        samples=40,
        held_out=4,
        dropped={"too-long": 3, "empty-cot": 1},
        tokens_per_sample=900.5,
        response_tokens_per_sample=700.25,
        tokens_per_step=3600,
        step_seconds=0.5,
        seconds=100,
        loss_first=5.0,
        loss_last=3.0,
        held_out_loss_before=held_out[0],
        held_out_loss_after=held_out[1],
        data_sha256="d" * 64,
        template="deepseek-r1",
        base="demo",
        device="cpu",
        versions=library_versions(),
    )
    write_card(folder, RUN, result)
    card = (folder / "README.md").read_text("utf-8")
    assert card.startswith("---\n")
    for expected in (
        "base_model: demo",
        "# short-thinker",
        "d" * 64,
        "1 empty-cot, 3 too-long",
        "5.0000, 3.0000 nats/token",
        "| learning_rate | `4e-05` |",
        f"| transformers | {importlib.metadata.version('transformers')} | Apache",
    ):
        assert expected in card
    assert ("2.5000, 1.2500" in card) == (held_out[0] is not None)


def test_every_library_has_a_version():
    versions = library_versions()
    assert versions["torch"] == importlib.metadata.version("torch")
    assert {"python", "trl", "accelerate"} <= versions.keys()
