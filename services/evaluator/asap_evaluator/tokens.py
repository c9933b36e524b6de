"""The tokenizer of a served model, read from `tokenizer.json` as it is.

transformers' classes are not used, because some rebuild the pre-tokenizer from the class name in
`tokenizer_config.json`, and the model would be asked in other tokens than it was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import tokenizers

from asap.chat_templates import Encoding
from asap.errors import Misconfigured
from asap.thinking import CLOSE

__all__ = ["ModelTokens"]


class ModelTokens:
    """The port `Encoder` of the core, and what generation needs. Safe to share between threads.

    Args:
        tokenizer: without padding and truncation.
        bos, eos: tokens that the model's files name so.
        ends: ids at which the model's files end a generation, beside EOS.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        bos: str | None,
        eos: str | None,
        ends: Sequence[int] = (),
    ) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self.bos_id = None if bos is None else self.token_id(bos)
        self.eos_id = None if eos is None else self.token_id(eos)
        own = () if self.eos_id is None else (self.eos_id,)
        self.stop_ids = tuple(sorted({*own, *ends}))
        """Where a completion ends."""

    @classmethod
    def load(cls, directory: Path) -> Self:
        """The tokenizer of a model's directory. Raises Misconfigured."""
        try:
            settings = json.loads((directory / "tokenizer_config.json").read_text("utf-8"))
            tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
            bos, eos, pad = (
                _token(settings.get(f"{name}_token")) for name in ("bos", "eos", "pad")
            )
        except Exception as error:  # the Rust side raises nothing narrower
            raise Misconfigured(
                "cannot read tokenizer.json and tokenizer_config.json of the model"
            ) from error
        padding = None if pad is None else tokenizer.token_to_id(pad)
        ends = _generation_ends(directory) + ([] if padding is None else [padding])
        return cls(tokenizer, bos, eos, ends)

    def token_id(self, token: str) -> int | None:
        """Id of a control token; None when the text is not exactly one token."""
        ids = self._tokenizer.encode(token, add_special_tokens=False).ids
        known: int | None = self._tokenizer.token_to_id(token)
        return known if ids == [known] else None

    def encode(self, text: str) -> Encoding:
        """All of the text, nothing added, nothing cut off."""
        found = self._tokenizer.encode(text, add_special_tokens=False)
        return Encoding(tuple(found.ids), tuple(found.offsets))

    def reasoning_tokens(self, ids: Sequence[int]) -> int:
        """Generated tokens before `</think>`; all of them when the thinking never ends. A token
        that holds the tag's begin and text before it counts as one of those before.
        """
        low, high = 0, len(ids)
        if CLOSE not in self._text(ids):
            return high
        while low < high:  # the shortest start that holds the whole tag
            middle = (low + high) // 2
            low, high = (low, middle) if CLOSE in self._text(ids[:middle]) else (middle + 1, high)
        place, before = self._text(ids[:low]).index(CLOSE), low - 1
        while len(self._text(ids[:before])) > place:
            before -= 1
        return before if len(self._text(ids[:before])) == place else before + 1

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text


def _token(value: Any) -> str | None:
    """A token of tokenizer_config.json, which may be an object with the text in it."""
    text: str | None = value["content"] if isinstance(value, dict) else value
    return text


def _generation_ends(directory: Path) -> list[int]:
    """`eos_token_id` of generation_config.json, where that is there: a number or several."""
    try:
        ends = json.loads((directory / "generation_config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return []
    ids = ends.get("eos_token_id") if isinstance(ends, dict) else None
    return [one for one in (ids if isinstance(ids, list) else [ids]) if isinstance(one, int)]
