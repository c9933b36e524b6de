"""Load a causal LM for scoring: device, type, complete weights, and a head that can be cut off.

Every failure becomes one sentence; transformers' own text of many lines stays the cause.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import transformers

from asap.errors import CapacityError, Misconfigured
from asap_runtime.model_files import locate_model
from asap_surprisal.attention import PACKED, PackedRow, Packing
from asap_surprisal.forward import CausalLM, float32_head
from asap_surprisal.last_layer import only_needed_places
from asap_surprisal.memory import free_bytes, plan_budget
from asap_surprisal.metering import PassCost
from asap_surprisal.products import use_onednn
from asap_surprisal.quantize import to_fp8

__all__ = ["Device", "Dtype", "causal_lm", "gpu_available", "load_model"]

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16", "fp8"]

_PROBE_TOKENS = 8
_PROBE_ROWS = [5, 8]
_PROBE_NEEDED = (1, 4)  # of each of them
_PROBE_ERROR = 0.05  # relative; deep models in bfloat16 differ by a few per cent between kernels
_PACKABLE = {"full_attention", "sliding_attention"}


def load_model(model: str, device: Device, dtype: Dtype) -> CausalLM:
    """The model in evaluation mode on its device. Raises Misconfigured or CapacityError."""
    directory = locate_model(model, weights=True)
    target = _resolve_device(device)
    computed = dtype
    if dtype in ("auto", "fp8"):
        computed = "bfloat16" if target.type == "cuda" else "float32"
    library: Any = transformers  # its types do not know `output_loading_info`
    library.utils.logging.disable_progress_bar()  # it would stand between the caller's lines
    try:
        loaded, report = library.AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=getattr(torch, computed),
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
    if dtype == "fp8":
        to_fp8(loaded.base_model)  # before the device sees the wide weights
    try:
        loaded = loaded.to(target).eval()
    except torch.OutOfMemoryError as error:
        raise CapacityError(f"the {target.type} device is too small for model {model!r}") from error
    _check_head(loaded, model)
    return causal_lm(loaded)


def causal_lm(loaded: Any) -> CausalLM:
    """The parts of a transformers model on its device, its attention replaced where that is safe.

    Rows share a pass where packed attention gives what the model's own attention gives; a model
    with attention of its own kind (soft caps, sinks, chunks, recurrent layers), or with positions
    that turn by the length of the longest row, runs row by row.
    """
    head, config = loaded.get_output_embeddings(), loaded.config.get_text_config()
    use_onednn(loaded)
    packs = _pack(loaded)
    return CausalLM(
        backbone=loaded.base_model,
        head=float32_head(head),
        device=loaded.device,
        dtype=loaded.dtype,
        max_positions=getattr(config, "max_position_embeddings", None),
        packs=packs,
        cost=PassCost.of(loaded.base_model, head, whole=not packs),
        budget=plan_budget(
            config, head.weight.itemsize, loaded.device.type, free_bytes(loaded.device)
        ),
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
def _pack(loaded: Any) -> bool:
    """Give the model packed attention; take it back where the two disagree."""
    config = loaded.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or _PACKABLE)
    if not kinds <= _PACKABLE or getattr(config, "attention_chunk_size", None):
        return False
    if _turns_by_length(getattr(config, "rope_parameters", None) or {}):
        return False
    backbone, own = loaded.base_model, loaded.config._attn_implementation
    ids = torch.arange(sum(_PROBE_ROWS), device=loaded.device)
    places = torch.cat([torch.arange(size, device=loaded.device) for size in _PROBE_ROWS])
    rows = [PackedRow(size, needed=_PROBE_NEEDED) for size in _PROBE_ROWS]
    packing = Packing(rows, loaded.device)
    apart = [
        backbone(input_ids=part[None], use_cache=False).last_hidden_state
        for part in torch.split(ids, _PROBE_ROWS)
    ]
    last = None
    try:
        loaded.set_attn_implementation(PACKED)
        last = only_needed_places(backbone.layers[-1])
        packed = backbone(
            input_ids=ids[None], position_ids=places[None], packing=packing, use_cache=False
        ).last_hidden_state
        expected = torch.cat(apart, dim=1)[:, packing.needed].float()
        if (packed.float() - expected).norm() <= _PROBE_ERROR * expected.norm():
            return True
    except Exception:  # model code of any kind: what it cannot do, it says in its own way
        pass
    loaded.set_attn_implementation(own)
    if last is not None:
        last.remove()
    return False


def _turns_by_length(rope: dict[str, Any]) -> bool:
    """Whether a long row would turn the positions of the short ones beside it in another way; the
    probe is too short to show that. Some models have parameters for each kind of layer.
    """
    kinds = (rope, *(part for part in rope.values() if isinstance(part, dict)))
    return any(kind.get("rope_type") == "longrope" for kind in kinds)


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
