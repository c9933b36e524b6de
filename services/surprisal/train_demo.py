"""Train the demo scorer that ships in the wheel: `python services/surprisal/train_demo.py`.

A byte-level BPE tokenizer and a small Qwen2 are trained on the example traces and saved, with a
model card, into the package. All that decides the result is a constant below; there are no options.
"""

from __future__ import annotations

import copy
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch.nn import functional
from transformers import Qwen2Config, Qwen2ForCausalLM

HERE = Path(__file__).parent
TRACES = HERE.parent.parent / "examples" / "triples.jsonl"
OUTPUT = HERE / "asap_surprisal" / "demo"

SEED = 0
HELD_OUT = 6  # records, at least; whole questions, so that no problem stands on both sides
VOCABULARY = 4096
MAX_POSITIONS = 4096
DROPOUT = 0.1
BPE_DROPOUT = 0.1  # other segmentations of the same 100k tokens: the cheapest way to more data
PEAK_RATE, LAST_RATE, WEIGHT_DECAY, WARMUP = 2e-3, 1e-4, 0.1, 20
# (tokens a row, rows a batch, steps): short rows learn the language at a fraction of the cost of
# attention, long ones teach the positions that whole traces have
PHASES = ((512, 8, 380), (2048, 2, 60), (4096, 1, 20))
EVALUATE_EVERY, PATIENCE = 20, 5

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
CHAT_MARKS = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
# Qwen2's pre-tokenizer: a run of newlines never merges with the character behind it, so that text
# is cut at every step start and token counts add up over steps.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<｜User｜>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "<｜Assistant｜>{{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# The demo scorer

A Qwen2 of {parameters:.2f} M parameters ({megabytes:.1f} MB, float16) with a byte-level BPE
tokenizer of {vocabulary} ids. It ships in the wheel so that the whole pipeline runs on any CPU with
no download: name the scorer `demo`.

**It is not the paper's scorer**, which is DeepSeek-R1-Distill-Qwen-7B. It has read
{train_tokens:,} different tokens. Its surprisals rank steps crudely (it knows which openings are
common, not whether a step follows), its token counts are its own tokenizer's, and the text it
generates is nonsense. Do not judge the method by it, and do not prune training data with it.

| | |
| --- | --- |
| held-out loss | {loss:.4f} nats/token (perplexity {perplexity:.1f}) |
| uniform distribution, ln {vocabulary} | {uniform:.4f} nats/token |
| training data | {traces} traces, {train_tokens:,} tokens |
| held-out data | {held_out_tokens:,} tokens, no question shared with training |
| best step, training time on 2 cores | {step}, {minutes:.0f} minutes |

## Data and licence

Trained from random weights on `examples/triples.jsonl` alone: real reasoning traces under
Apache-2.0, listed one by one with source and licence in `examples/LICENSES.md`. Nothing under a
non-commercial licence was used. Tokenizer and weights are under Apache-2.0. Form of a training
text:
`{{bos}}{{question}}\\n<think>\\n{{cot}}\\n</think>\\n{{answer}}{{eos}}`.

Held-out records, chosen by whole questions with a fixed seed; tokenizer and weights saw none of
them, but the stopping step was chosen on them:

{held_out}

## Train it again

```
python services/surprisal/train_demo.py
```

Seeds, sizes and the schedule are constants at the top of that file. Kernels and thread counts
differ between machines, so the last digits of the loss may too.
"""


def read_traces() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(training, held-out) records. A question's records stay on one side."""
    records = [json.loads(line) for line in TRACES.read_text(encoding="utf-8").splitlines()]
    questions = list(dict.fromkeys(record["question"] for record in records))
    random.Random(SEED).shuffle(questions)
    held_out: set[str] = set()
    while sum(record["question"] in held_out for record in records) < HELD_OUT:
        held_out.add(questions[len(held_out)])
    train = [record for record in records if record["question"] not in held_out]
    return train, [record for record in records if record["question"] in held_out]


def render(record: dict[str, str]) -> str:
    """The text of one trace without BOS and EOS, in the form that the scorer's context has."""
    return f"{record['question']}\n<think>\n{record['cot']}\n</think>\n{record['answer']}"


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """A byte-level BPE of VOCABULARY ids, special tokens and chat marks included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()  # as Qwen2's, which some loaders insist on
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(CHAT_MARKS),
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(mark, normalized=False, special=False) for mark in CHAT_MARKS])
    tokenizer.post_processor = processors.TemplateProcessing(  # BOS by default, as R1's tokenizer
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.encode(BOS).ids[0])]
    )
    return tokenizer


def build_model(tokenizer: Tokenizer) -> Any:
    """A Qwen2 of about 2.5 M parameters with random weights."""
    config = Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        attention_dropout=DROPOUT,
    )
    model: Any = Qwen2ForCausalLM(config)  # type: ignore[no-untyped-call]
    for name, module in model.named_modules():  # Qwen2 has no residual dropout of its own
        if name.endswith(("embed_tokens", "self_attn.o_proj", "mlp.down_proj")):
            module.register_forward_hook(
                lambda module, _, output: functional.dropout(output, DROPOUT, module.training)
            )
    return model


def encode(tokenizer: Tokenizer, record: dict[str, str]) -> list[int]:
    """One trace with BOS and EOS."""
    specials: Any = tokenizer.token_to_id  # never None: both are in every vocabulary made here
    ids = tokenizer.encode(render(record), add_special_tokens=False).ids
    return [specials(BOS), *ids, specials(EOS)]


def batches(tokenizer: Tokenizer, records: Sequence[dict[str, str]]) -> Iterator[torch.Tensor]:
    """int64 (rows, tokens), phase after phase, cut from freshly segmented and shuffled traces."""
    generator = random.Random(SEED)
    stream: list[int] = []
    for tokens, rows, steps in PHASES:
        for _ in range(steps):
            while len(stream) < tokens * rows:
                for record in generator.sample(records, len(records)):
                    stream += encode(tokenizer, record)
            yield torch.tensor(stream[: tokens * rows]).view(rows, tokens)
            del stream[: tokens * rows]


@torch.inference_mode()
def held_out_loss(model: Any, sequences: Sequence[list[int]]) -> float:
    """Mean nats per token, each trace alone from its BOS on, cut at MAX_POSITIONS."""
    model.eval()
    total, count = 0.0, 0
    for sequence in sequences:
        ids = torch.tensor([sequence[:MAX_POSITIONS]])
        logits = model(ids, use_cache=False).logits[0, :-1].float()
        total += functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    model.train()
    return total / count


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from PEAK_RATE to LAST_RATE."""
    if step < WARMUP:
        return PEAK_RATE * (step + 1) / WARMUP
    progress = (step - WARMUP) / (steps - WARMUP)
    return LAST_RATE + (PEAK_RATE - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def fit(
    model: Any,
    tokenizer: Tokenizer,
    train: Sequence[dict[str, str]],
    held_out: Sequence[list[int]],
) -> int:
    """Train until the held-out loss stops falling; the best weights stay. Returns their step."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": WEIGHT_DECAY},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=PEAK_RATE,
        betas=(0.9, 0.95),
    )
    steps = sum(steps for _, _, steps in PHASES)
    best, best_step, best_weights = math.inf, 0, model.state_dict()
    tokenizer.model.dropout = BPE_DROPOUT
    for step, ids in enumerate(batches(tokenizer, train)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        logits = model(ids[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % EVALUATE_EVERY and step + 1 < steps:
            continue
        now = held_out_loss(model, held_out)
        print(
            f"step {step + 1:4d}/{steps}  training {loss.item():.3f}  held-out {now:.3f} nats/token"
        )
        if now < best:
            best, best_step, best_weights = now, step + 1, copy.deepcopy(model.state_dict())
        elif step + 1 - best_step >= PATIENCE * EVALUATE_EVERY:
            break
    tokenizer.model.dropout = None
    model.load_state_dict(best_weights)
    return best_step


def save(model: Any, tokenizer: Tokenizer) -> None:
    """float16 safetensors, config and tokenizer, as transformers and vLLM load them."""
    model.config.attention_dropout = 0.0
    model.half().save_pretrained(OUTPUT)
    (OUTPUT / "model.safetensors").chmod(0o644)  # it is written for its owner alone
    tokenizer.save(str(OUTPUT / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(settings, ensure_ascii=False, indent=2)
    (OUTPUT / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Train, save, measure what was saved, write the model card."""
    started = time.monotonic()
    torch.manual_seed(SEED)
    train, held_out = read_traces()
    tokenizer = train_tokenizer([render(record) for record in train])
    model = build_model(tokenizer)
    sequences = [encode(tokenizer, record) for record in held_out]
    train_tokens = sum(len(encode(tokenizer, record)) for record in train)
    print(f"{model.num_parameters():,} parameters, {train_tokens:,} training tokens")
    step = fit(model, tokenizer, train, sequences)
    save(model, tokenizer)
    saved = Qwen2ForCausalLM.from_pretrained(OUTPUT, dtype=torch.float32)
    loss = held_out_loss(saved, sequences)
    card = CARD.format(
        parameters=model.num_parameters() / 1e6,
        megabytes=(OUTPUT / "model.safetensors").stat().st_size / 1e6,
        vocabulary=VOCABULARY,
        traces=len(train),
        train_tokens=train_tokens,
        held_out_tokens=sum(map(len, sequences)),
        held_out="\n".join(f"- `{record['id']}`" for record in held_out),
        loss=loss,
        perplexity=math.exp(loss),
        uniform=math.log(VOCABULARY),
        step=step,
        minutes=(time.monotonic() - started) / 60,
    )
    (OUTPUT / "README.md").write_text(card, encoding="utf-8")
    print(f"held-out {loss:.4f} nats/token after step {step}, saved to {OUTPUT}")


if __name__ == "__main__":
    main()
