"""The folder of a trained model: weights as they were saved, the base model's own tokenizer files
with the chat template that was trained, and a card that says how it was made.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asap.runs import TrainResult, TrainRun
from asap.sft import ChatTemplate
from asap_trainer.encoding import HFEncoder

__all__ = ["complete_folder", "library_versions", "write_card"]

_TOKENIZER = (
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
_LIBRARIES = (
    "asap-cot",
    "torch",
    "transformers",
    "tokenizers",
    "trl",
    "accelerate",
    "datasets",
    "peft",
    "unsloth",
    "unsloth_zoo",
)
_LICENCE_CHARACTERS = 60
"""Some packages put the whole text where a name belongs."""
_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
base_model: {base}
---

# {model}

{base}, fine-tuned in all its weights on pruned chains of thought by ASAP.

## Figures

| | |
| --- | --- |
{figures}

## Recipe

| | |
| --- | --- |
{recipe}

## Prompt

Template `{template}`, in `tokenizer_config.json`. The prompt ends in `<think>` and a newline; the
model goes on with its thinking, `</think>` and the answer.

## Libraries

| | version | licence |
| --- | --- | --- |
{libraries}

The model's licence is that of its base model and of the data it was trained on.
"""


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that had a part, those that are installed."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def complete_folder(folder: Path, base: Path, template: ChatTemplate, run: TrainRun) -> None:
    """Make a folder with config and weights one that any engine serves.

    The tokenizer's files are the base model's, byte for byte: libraries that load and save a
    tokenizer may write another one.
    """
    for name in ("training_args.bin", "chat_template.jinja", "tokenizer_config.json", *_TOKENIZER):
        (folder / name).unlink(missing_ok=True)
    for name in _TOKENIZER:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    eos = HFEncoder.load(base).eos_id
    _change(base, folder, "tokenizer_config.json", chat_template=template.jinja())
    _change(folder, folder, "config.json", eos_token_id=eos)
    # From the base model, whose own sampling settings stay.
    _change(base, folder, "generation_config.json", eos_token_id=eos)
    (folder / "run.json").write_text(run.model_dump_json(indent=1) + "\n")


def _change(source: Path, target: Path, name: str, **values: object) -> None:
    path = source / name
    before = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    text = json.dumps({**before, **values}, ensure_ascii=False, indent=2)
    (target / name).write_text(f"{text}\n", encoding="utf-8")


def write_card(folder: Path, run: TrainRun, result: TrainResult) -> None:
    """README.md: where the model comes from, how it was trained, what came of it.

    The card is part of the folder, so it cannot say the hash of the folder's manifest.
    """
    dropped = ", ".join(f"{count} {why}" for why, count in sorted(result.dropped.items()))
    figures: Mapping[str, Any] = {
        "run": f"`{run.id}`",
        "SHA-256 of the data": f"`{result.data_sha256}`",
        "samples": result.samples,
        "held out": result.held_out,
        "dropped": dropped or "none",
        "tokens a sample": f"{result.tokens_per_sample:.1f}",
        "of these with loss": f"{result.response_tokens_per_sample:.1f}",
        "steps": result.steps,
        "tokens a step": f"{result.tokens_per_step:.1f}",
        "loss, first and last": f"{result.loss_first:.4f}, {result.loss_last:.4f} nats/token",
        "held-out loss, before and after": _pair(
            result.held_out_loss_before, result.held_out_loss_after
        ),
        "seconds": f"{result.seconds:.0f} on {result.device}",
    }
    text = _CARD.format(
        base=run.base,
        model=run.model,
        template=result.template,
        figures=_table(figures),
        recipe=_table({name: f"`{value}`" for name, value in run.config.model_dump().items()}),
        libraries="\n".join(
            f"| {name} | {version} | {_licence(name)} |"
            for name, version in result.versions.items()
        ),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _pair(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return "not measured"
    return f"{before:.4f}, {after:.4f} nats/token"


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _licence(name: str) -> str:
    """As the package itself says, in one line."""
    if name == "python":
        return "PSF-2.0"
    metadata = importlib.metadata.metadata(name)
    said = [*metadata.get_all("License-Expression", []), *metadata.get_all("License", [])]
    short = [one for one in said if "\n" not in one and len(one) < _LICENCE_CHARACTERS]
    known = [
        line.rpartition(" :: ")[2]
        for line in metadata.get_all("Classifier", [])
        if line.startswith("License :: ")
    ]
    return next(iter([*short, *known]), "see the package")
