"""Load a causal LM for scoring: device, type, complete weights, and a head that can be cut off.

Every failure becomes one sentence; transformers' own text of many lines stays the cause.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import transformers

from asap.errors import CapacityError, Misconfigured
from asap_surprisal.forward import CausalLM, float32_head
from asap_surprisal.model_files import locate_model

__all__ = ["Device", "Dtype", "gpu_available", "load_model"]

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

_PROBE_TOKENS = 8


def load_model(model: str, device: Device, dtype: Dtype) -> CausalLM:
    """The model in evaluation mode on its device. Raises Misconfigured or CapacityError."""
    directory = locate_model(model, weights=True)
    target = _resolve_device(device)
    if dtype == "auto":
        dtype = "bfloat16" if target.type == "cuda" else "float32"
    library: Any = transformers  # its types do not know `output_loading_info`
    library.utils.logging.disable_progress_bar()  # it would stand between the caller's lines
    try:
        loaded, report = library.AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=getattr(torch, dtype),
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # many libraries, each with errors of its own
        raise Misconfigured(
            f"cannot load model {model!r}: its config or weights are damaged, or its architecture "
            f"is not one of transformers' own ({type(error).__name__})",
            model=model,
        ) from error
    if report["missing_keys"]:
        raise Misconfigured(
            f"the weights of model {model!r} are incomplete: "
            f"{len(report['missing_keys'])} tensors are missing",
            model=model,
        )
    try:
        loaded = loaded.to(target).eval()
    except torch.OutOfMemoryError as error:
        raise CapacityError(f"the {target.type} device is too small for model {model!r}") from error
    _check_head(loaded, model)
    return CausalLM(
        backbone=loaded.base_model,
        head=float32_head(loaded.get_output_embeddings()),
        device=target,
        max_positions=getattr(loaded.config.get_text_config(), "max_position_embeddings", None),
    )


def gpu_available() -> bool:
    """Whether torch sees a GPU."""
    return torch.cuda.is_available()


def _resolve_device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if gpu_available() else "cpu"
    if device == "cuda" and not gpu_available():
        raise Misconfigured(
            "device 'cuda' was asked for, but torch sees no GPU; use 'auto' or 'cpu'"
        )
    return torch.device(device)


@torch.inference_mode()
def _check_head(model: Any, name: str) -> None:
    """Refuse models that change their logits behind the output layer (soft caps, scales).

    The scorer applies the layer to a few rows by itself, so it must be all there is.
    """
    ids = torch.arange(_PROBE_TOKENS, device=model.device)[None]
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    expected = model(input_ids=ids, use_cache=False).logits
    if not torch.allclose(model.get_output_embeddings()(hidden), expected, rtol=1e-2, atol=1e-2):
        raise Misconfigured(
            f"model {name!r} changes its logits behind the output layer (soft cap or scale), "
            "which the scorer does not support; use another model",
            model=name,
        )
