"""What the tests of the scorer share: models of two families, and the naive path as the truth."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from asap.config import ScoreName
from asap.ports import ScoreRequest
from asap.surprisal import build_context
from asap_surprisal.forward import CausalLM
from asap_surprisal.loading import load_model
from asap_surprisal.scorer import TorchScorer
from asap_surprisal.tokenization import HFTokenCounter
from tiny_model import SENTENCES

ALL_SCORES: tuple[ScoreName, ...] = get_args(ScoreName)
FIRST: tuple[ScoreName, ...] = ("first_token_surprisal",)
QUESTION = "What is the sum of x and y?"
STEPS = (
    "Okay, so I need to find the sum.",
    "    total = x + y",
    "Wait, let me check that again.",
    "然后我们检查 🙂",
    "So x is 3.",
    "🙂 done",
    "So x is 3.",
)
TOKENIZERS = ("tiny_model_dir", "tiny_model_no_bos_dir", "tiny_model_merging_dir")
FAMILIES = {
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {"head_dim": 32, "final_logit_softcapping": None, "attn_logit_softcapping": 1.0},
    ),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "longrope": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "factor": 8.0,
                "original_max_position_embeddings": 64,
                "short_factor": [1.0] * 16,
                "long_factor": [4.0] * 16,
            }
        },
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 24}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
}


def request_of(*steps: str, question: str = QUESTION, scores=ALL_SCORES, context="raw"):
    return ScoreRequest(question, tuple(steps or STEPS), tuple(scores), context)


def load(directory: Path, *, max_batch_tokens: int = 8192, **changes) -> TorchScorer:
    """A CPU scorer on `directory`, with parts of its model replaced."""
    model = dataclasses.replace(load_model(str(directory), "cpu", "float32"), **changes)
    counter = HFTokenCounter.load(str(directory))
    return TorchScorer("tiny", model, counter, max_batch_tokens=max_batch_tokens)


def of_family(family: str, source: Path, directory: Path, *, dtype=torch.float32) -> Path:
    """Another architecture with random weights and the tokenizer of `source`."""
    shutil.copytree(source, directory)
    (directory / "model.safetensors").unlink()
    old = json.loads((directory / "config.json").read_text())
    config, architecture, extra = FAMILIES[family]
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "bos_token_id")
    heads = ("num_attention_heads", "num_key_value_heads", "initializer_range")
    settings = {name: old[name] for name in (*kept, *heads)}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = architecture(config(**settings, max_position_embeddings=2048, **extra))
        model.to(dtype).save_pretrained(directory)
    return directory


def with_words(source: Path, directory: Path) -> Path:
    """The model of `source` with a tokenizer of whole words, no BOS and no offsets in blanks."""
    shutil.copytree(source, directory)
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordLevelTrainer(
        vocab_size=200, special_tokens=["[UNK]", "<think>"], show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": None}))
    return directory


@cache
def full_model(directory: Path):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def log_softmax_of(directory: Path, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return full_model(directory)(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def naive_scores(directory: Path, request: ScoreRequest) -> dict[str, list[float]]:
    """All four scores, one sequence, every row of the vocabulary."""
    context = build_context(request.question, request.steps, request.context)
    encoding = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(
        context.text, add_special_tokens=False
    )
    bos = json.loads((directory / "tokenizer_config.json").read_text())["bos_token"]
    ids = [] if bos is None else [full_model(directory).config.bos_token_id]
    ids = ids + encoding.ids
    shift = len(ids) - len(encoding.ids)
    log_p = log_softmax_of(directory, ids)
    entropy = -(log_p.exp() * log_p).sum(-1)
    found: dict[str, list[float]] = {name: [] for name in ALL_SCORES}
    for start, end in zip(context.starts, context.ends, strict=True):
        tokens = [i + shift for i, (a, b) in enumerate(encoding.offsets) if b > start and a < end]
        surprisals = [-log_p[t - 1, ids[t]].item() for t in tokens]
        entropies = [entropy[t - 1].item() for t in tokens]
        found["first_token_surprisal"].append(surprisals[0])
        found["first_token_entropy"].append(entropies[0])
        found["mean_surprisal"].append(sum(surprisals) / len(tokens))
        found["step_entropy"].append(sum(entropies) / len(tokens))
    return found


def toy_counter(*words: str) -> HFTokenCounter:
    """One token per word; blanks, `<think>` and zero-width spaces vanish."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))
    gone = Regex("(<think>|[ \u200b\n])+")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(gone, behavior="removed")
    return HFTokenCounter("toy", tokenizer)


def table_model(log_p: torch.Tensor) -> CausalLM:
    """A model whose next token depends on the previous one only. log_p: previous x next token."""

    def backbone(input_ids, use_cache):
        one_hot = torch.nn.functional.one_hot(input_ids, log_p.shape[0]).float()
        return SimpleNamespace(last_hidden_state=one_hot)

    return CausalLM(backbone, lambda states: states @ log_p, torch.device("cpu"))
