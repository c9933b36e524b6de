"""What cannot be loaded is one sentence; what the hub has is loaded like a directory."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import Gemma2Config, Gemma2ForCausalLM

from asap.errors import Misconfigured
from asap_surprisal.scorer import TorchScorer


@pytest.fixture
def broken(tiny_model_dir, tmp_path) -> Path:
    """A copy of a good model directory, to be damaged."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def misconfigured(model: str | Path, **options) -> str:
    """The one sentence that loading `model` fails with."""
    with pytest.raises(Misconfigured) as caught:
        TorchScorer.load(str(model), **options)
    assert "\n" not in caught.value.detail
    assert len(caught.value.detail) < 300
    return caught.value.detail


def test_missing_directory(tmp_path):
    assert "there is no model directory" in misconfigured(tmp_path / "nowhere")
    assert "there is no model directory" in misconfigured("./nowhere")


def test_file_instead_of_directory(broken):
    assert "is a file" in misconfigured(broken / "config.json")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_directory_without_permission(broken):
    broken.chmod(0)
    assert "cannot read" in misconfigured(broken)
    broken.chmod(0o755)


def test_directory_that_the_system_refuses(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert "Permission denied" in misconfigured(tmp_path)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("tokenizer.json", "no fast tokenizer"),
        ("config.json", "no config"),
        ("model.safetensors", "no safetensors weights"),
    ],
)
def test_missing_file(broken, file, words):
    (broken / file).unlink()
    assert words in misconfigured(broken)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("tokenizer.json", b"{}", "cannot read tokenizer.json"),
        ("tokenizer_config.json", b"[1]", "cannot read tokenizer_config.json"),
        ("tokenizer_config.json", b"\xff", "cannot read tokenizer_config.json"),
        ("config.json", b"{", "cannot load model"),
        ("config.json", b'{"model_type": "unheard-of"}', "cannot load model"),
        ("model.safetensors", b"12345678", "cannot load model"),
    ],
)
def test_damaged_file(broken, file, content, words):
    (broken / file).write_bytes(content)
    assert words in misconfigured(broken)


def test_incomplete_weights(broken):
    from safetensors.torch import load_file, save_file

    weights = load_file(broken / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    assert "1 tensors are missing" in misconfigured(broken)


def test_logits_changed_behind_the_head(broken):
    vocabulary = json.loads((broken / "config.json").read_text())["vocab_size"]
    config = Gemma2Config(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.5,
        final_logit_softcapping=1.0,
    )
    Gemma2ForCausalLM(config).save_pretrained(broken)
    assert "behind the output layer" in misconfigured(broken)


def test_name_that_the_hub_does_not_know(monkeypatch):
    def offline(*_, **__):
        raise LocalEntryNotFoundError("many\nlines of advice")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert "neither a local directory nor available" in misconfigured("owner/unheard-of")


def test_name_that_cannot_be_one():
    assert "neither a local directory nor available" in misconfigured("no such name")


def test_hub_name_loads_what_was_downloaded(monkeypatch, tiny_model_dir):
    asked = {}

    def download(name, allow_patterns):
        asked[name] = allow_patterns
        return str(tiny_model_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert TorchScorer.load("owner/name", device="cpu").name == "owner/name"
    assert "model*.safetensors" in asked["owner/name"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_that_is_not_there(tiny_model_dir):
    assert "torch sees no GPU" in misconfigured(tiny_model_dir, device="cuda")
