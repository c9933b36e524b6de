"""Tiny real models: random Qwen2 weights and a tokenizer trained on a few sentences, as directories
that transformers and vLLM load like any other.

Three tokenizers that matter for first tokens: byte-level BPE with BOS, the same without BOS (both
cut text at every step start), and a SentencePiece-like one that merges newlines with the next
letter. The last is for the scorer alone: transformers rebuilds any Qwen2 tokenizer as byte-level.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import Qwen2Config, Qwen2ForCausalLM

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
CHAT_MARKS = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
SENTENCES = (
    "Okay, so I need the sum of the two numbers.\n\nWait, let me check that again.\n\nSo x is 3.",
    "Hmm, the list may be empty.\n\nWait, then we return 0.\n\nSo the answer is y.\n\nWait, no.",
    "def solve(n):\n    total = 0\n    for i in range(n):\n        total += i\n    return total\n",
    "Alternatively, we could sort first.\n\nSo O(n).\n\n然后我们检查 🙂 每个。\n\nSo done.",
) * 4
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<｜User｜>{{ message['content'] }}"
    "{% else %}<｜Assistant｜>{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)


def build_tiny_model(
    directory: Path,
    *,
    bos: bool = True,
    kind: Literal["byte_level", "metaspace"] = "byte_level",
    max_positions: int = 2048,
    seed: int = 0,
) -> Path:
    """Write config, weights (float32, about 0.3 M parameters) and tokenizer to `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _byte_level() if kind == "byte_level" else _metaspace()
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in CHAT_MARKS])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS if bos else None,
        "eos_token": EOS,
        "pad_token": EOS,
        "model_max_length": max_positions,
        "chat_template": CHAT_TEMPLATE if bos else CHAT_TEMPLATE.removeprefix("{{ bos_token }}"),
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    config = Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,  # heads of 32, the smallest that vLLM's CPU attention takes
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_positions,
        bos_token_id=tokenizer.token_to_id(BOS) if bos else None,
        eos_token_id=tokenizer.token_to_id(EOS),
        initializer_range=0.1,  # distributions are far from uniform, and float32 keeps 5 digits
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        Qwen2ForCausalLM(config).save_pretrained(directory)
    return directory


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def _metaspace() -> Tokenizer:
    """Llama-2 style: blanks become "▁", unknown characters fall back to byte tokens, and newlines
    merge with what follows them."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=["<unk>", BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256))],
        limit_alphabet=70,
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer
