"""Where a model's files are: a local directory, the shipped demo, or the Hugging Face hub's cache.

Every name ends as one local directory with the same few files, so that tokenizer and weights have a
single way of loading. Knows file names only, neither tokenizers nor torch.
"""

from __future__ import annotations

from pathlib import Path

import httpx

from asap.errors import Misconfigured
from asap_runtime.demo_model import DEMO, demo_directory

__all__ = ["DEFAULT_MODEL", "locate_model"]

DEFAULT_MODEL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"  # §4.1

_TOKENIZER: tuple[str, ...] = ("tokenizer.json",)
_CONFIG: tuple[str, ...] = ("config.json",)
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_TOKENIZER_PATTERNS = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
_MODEL_PATTERNS = [
    *_TOKENIZER_PATTERNS,
    *("config.json", "generation_config.json", "chat_template.jinja"),
    *("model*.safetensors", _WEIGHTS[1]),
]


def locate_model(model: str, *, weights: bool) -> Path:
    """The directory with the files of `model`, downloaded if need be.

    Args:
        model: "demo", a local directory, or a name on the Hugging Face hub.
        weights: whether config and weights are needed, or the tokenizer alone.

    Raises:
        Misconfigured: no such directory or name, or a needed file is missing.
    """
    directory = demo_directory() if model == DEMO else _local(model)
    if directory is None:
        directory = _download(model, _MODEL_PATTERNS if weights else _TOKENIZER_PATTERNS)
    needed = [("fast tokenizer", _TOKENIZER)]
    if weights:
        needed += [("config", _CONFIG), ("safetensors weights", _WEIGHTS)]
    for what, names in needed:
        if not any((directory / name).is_file() for name in names):
            raise Misconfigured(
                f"model {model!r} holds no {what}; expected {' or '.join(names)}",
                model=model,
            )
    return directory


def _local(model: str) -> Path | None:
    """The directory that `model` names; None when it must be a hub name."""
    path = Path(model).expanduser()
    try:
        if path.is_dir():
            next(path.iterdir(), None)  # asks for the right to read it
            return path
        is_file = path.exists()
    except OSError as error:
        raise Misconfigured(
            f"cannot read the model directory {model!r}: {error.strerror}", model=model
        ) from error
    if is_file:
        raise Misconfigured(f"model {model!r} is a file; expected a directory", model=model)
    if model.startswith((".", "~", "/")) or model.count("/") > 1:
        raise Misconfigured(f"there is no model directory {model!r}", model=model)
    return None


def _download(model: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download  # only the roles that load models have it

    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (OSError, ValueError, httpx.HTTPError) as error:  # the hub's errors are one of these
        raise Misconfigured(
            f"model {model!r} is neither a local directory nor available from the Hugging Face "
            "hub; check the name, the network and HF_TOKEN, or name a local directory",
            model=model,
        ) from error
