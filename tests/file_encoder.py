"""A real tokenizer behind the port `Encoder`, read from the files of a model's directory."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from asap.sft import Encoding

CHATML = ("<|im_start|>", "<|im_end|>")


class FileEncoder:
    """`own` replaces BOS and EOS of tokenizer_config.json; `added` become control tokens first."""

    def __init__(
        self,
        directory: Path,
        own: tuple[str | None, str | None] | None = None,
        added: tuple[str, ...] = (),
    ) -> None:
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.tokenizer.post_processor = None  # it would add specials, and trim blanks off spans
        self.tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in added])
        settings = json.loads((directory / "tokenizer_config.json").read_text())
        bos, eos = own or (settings["bos_token"], settings["eos_token"])
        self.bos_id = None if bos is None else self.token_id(bos)
        self.eos_id = None if eos is None else self.token_id(eos)

    @classmethod
    def chatml(cls, directory: Path) -> FileEncoder:
        """The same tokenizer in the chat form of Qwen: no BOS, EOS is <|im_end|>."""
        return cls(directory, (None, "<|im_end|>"), CHATML)

    def encode(self, text: str) -> Encoding:
        encoded = self.tokenizer.encode(text)
        return Encoding(tuple(encoded.ids), tuple(encoded.offsets))

    def token_id(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)
