"""A model's tokenizer: counts, ids and character spans. Loads without the model and without torch.

`tokenizer.json` is read as it is. transformers' classes are not used, because some rebuild the
pre-tokenizer from the class name in `tokenizer_config.json`, which for the R1 distillations names
the wrong family; counts and step boundaries would then differ from what the model was trained with.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from tokenizers import Encoding, Tokenizer

from asap.errors import Misconfigured
from asap_runtime.model_files import locate_model

__all__ = ["HFTokenCounter"]


class HFTokenCounter:
    """Counts and encodes; never adds special tokens. Safe to use from several threads.

    Args:
        name: names the tokenizer wherever a count is shown.
        tokenizer: without padding and truncation.
        bos_id: id of the BOS token; None when the tokenizer defines none.
        max_length: longest sequence that the tokenizer's files allow; None when they do not say.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        *,
        bos_id: int | None = None,
        max_length: int | None = None,
    ) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._name, self._tokenizer = name, tokenizer
        self.bos_id, self.max_length = bos_id, max_length

    @classmethod
    def load(cls, model: str) -> Self:
        """The tokenizer of a hub name, a local directory or "demo". Raises Misconfigured."""
        directory = locate_model(model, weights=False)
        settings = _read_settings(directory, model)
        try:
            tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        except Exception as error:  # the Rust side raises nothing narrower
            raise Misconfigured(
                f"cannot read tokenizer.json of model {model!r}: damaged, or of an unknown format",
                model=model,
            ) from error
        bos, max_length = settings.get("bos_token"), settings.get("model_max_length")
        if isinstance(bos, dict):
            bos = bos.get("content")
        return cls(
            model,
            tokenizer,
            bos_id=tokenizer.token_to_id(bos) if bos else None,
            max_length=int(max_length) if max_length else None,
        )

    @property
    def tokenizer_name(self) -> str:
        """The model's name: a tokenizer belongs to its model."""
        return self._name

    def count(self, text: str) -> int:
        """Number of ids of `text`, special tokens not included."""
        return self.count_all([text])[0]

    def count_all(self, texts: Sequence[str]) -> list[int]:
        """`count` of each text, in parallel and without the cost of spans."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [len(encoding) for encoding in encodings]

    def encode(self, text: str) -> Encoding:
        """Ids of `text`, with `offsets` in code points; special tokens not included."""
        return self._tokenizer.encode(text, add_special_tokens=False)


def _read_settings(directory: Path, model: str) -> dict[str, Any]:
    """`tokenizer_config.json`, over the older `special_tokens_map.json`; both are optional."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            settings |= json.loads((directory / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError) as error:
            raise Misconfigured(
                f"cannot read {name} of model {model!r}; expected a JSON object", model=model
            ) from error
    return settings
