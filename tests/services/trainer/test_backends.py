"""Device, imports and loading: what is refused, and with what words. Training itself is in
tests/contract/test_train_unsloth.py, for both backends.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch

from asap.errors import Misconfigured
from asap.train_config import TrainConfig
from asap_trainer.backends import find_device, load_model

CPU = TrainConfig(preset="demo", backend="plain", max_seq_length=256)


def changed(**fields):
    return TrainConfig.model_validate({**CPU.model_dump(), **fields})


def test_weights_of_a_cpu_stay_wide():
    device = find_device(changed(precision="bfloat16"))
    assert device.torch_device.type == "cpu"
    assert device.weights == torch.float32
    assert device.autocast == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert device.name == "cpu"
    assert not find_device(CPU).autocast


def test_several_processes_are_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    device = find_device(CPU)
    assert (device.processes, device.name) == (4, "4 x cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(Misconfigured, match="set gpus to 0"):
        find_device(changed(gpus=1))


def test_all_weights_are_trained(tiny_model_dir):
    model = load_model(CPU, tiny_model_dir, find_device(CPU))
    assert all(weight.requires_grad for weight in model.parameters())
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_more_positions_than_the_model_has_are_refused(tiny_model_dir):
    with pytest.raises(Misconfigured, match=r"max_seq_length is 4,096.*2,048"):
        load_model(changed(max_seq_length=4096), tiny_model_dir, find_device(CPU))


@pytest.mark.parametrize("damage", ["weights", "config"])
def test_a_damaged_base_model_is_refused(tiny_model_dir, tmp_path, damage):
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    if damage == "weights":
        (base / "model.safetensors").write_bytes(b"cut off")
    else:
        (base / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    with pytest.raises(Misconfigured, match="cannot load the base model"):
        load_model(CPU, base, find_device(CPU))


def test_incomplete_weights_are_refused(tiny_model_dir, tmp_path):
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    weights = load_file(base / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Misconfigured, match="incomplete"):
        load_model(CPU, base, find_device(CPU))


def test_a_process_that_only_launches_imports_no_torch():
    code = (
        "import sys, asap_trainer.backends, asap_trainer.batches, asap_trainer.metering, "
        "asap_trainer.progress, asap_trainer.checkpoints, asap_trainer.preflight, "
        "asap_trainer.train, asap_trainer.model_card\n"
        "assert not {'torch', 'transformers', 'trl', 'unsloth'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
