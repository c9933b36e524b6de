"""Training examples: (Q, C', A) to ids and labels, and what is refused or dropped (§3.4, eq. 3).

Knows positions and sums, no tokenizer and no trainer. The ids of an example start with exactly the
ids of the string that serving sends; what the model then has to say, up to its EOS, carries loss.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from asap.chat_templates import (
    FORCED_PREFIX,
    TEMPLATES,
    ChatTemplate,
    Encoder,
    Encoding,
    SftSample,
    TrainingText,
    check_template_string,
    template_for,
)
from asap.errors import InvalidInput
from asap.thinking import check_control_tokens
from asap.train_config import TrainConfig

__all__ = [
    "IGNORED",
    "TEMPLATES",
    "ChatTemplate",
    "Encoder",
    "Encoding",
    "SftExample",
    "SftSample",
    "TrainingText",
    "check_example",
    "check_template_string",
    "common_ids",
    "drop_reason",
    "encode_sample",
    "learning_rate",
    "template_for",
]

IGNORED = -100
"""Label of a token without loss, as in every PyTorch loss."""


@dataclass(frozen=True, slots=True)
class SftExample:
    """What is fed to the model: ids, and labels of the same length, `IGNORED` without loss."""

    id: str
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


def encode_sample(
    sample: SftSample, template: ChatTemplate, encoder: Encoder, config: TrainConfig
) -> SftExample:
    """Ids and labels of one sample, however long.

    The mask goes by position, never by id, so an EOS that doubles as padding keeps its loss. A
    token that starts before the loss does and reaches into it has no loss. Raises InvalidInput
    `control-token-in-text`. Encodes the text twice at most.
    """
    for field in ("question", "cot", "answer"):
        check_control_tokens(field, getattr(sample, field))
    training = template.render(sample)
    encoding = _encode(training, template, encoder)
    loss_from = _loss_from(training, config)
    labels = (
        token if start >= loss_from else IGNORED
        for token, (start, _) in zip(encoding.ids, encoding.spans, strict=True)
    )
    return SftExample(sample.id, encoding.ids, tuple(labels))


def _loss_from(training: TrainingText, config: TrainConfig) -> int:
    if config.loss_on == "all":
        return 0
    return training.loss_from - (0 if config.mask_forced_prefix else len(FORCED_PREFIX))


def _encode(training: TrainingText, template: ChatTemplate, encoder: Encoder) -> Encoding:
    """The text as one, unless a token would hold both the prompt's last newline and what follows
    it. Serving ends its prompt there, so the model would never see that token: then each side is
    encoded by itself, the second behind a control token, which keeps a tokenizer from treating it
    as the start of a text.
    """
    cut = training.loss_from
    whole = encoder.encode(training.text)
    if not any(start < cut < end for start, end in whole.spans):
        return whole
    prompt = encoder.encode(training.text[:cut])
    rest = encoder.encode(template.eos + training.text[cut:])
    shift = cut - len(template.eos)
    moved = tuple((start + shift, end + shift) for start, end in rest.spans[1:])
    return Encoding(prompt.ids + rest.ids[1:], prompt.spans + moved)


def check_example(
    example: SftExample,
    sample: SftSample,
    template: ChatTemplate,
    encoder: Encoder,
    config: TrainConfig,
) -> None:
    """Refuse an example that would train on anything but the loss that `config` asks for, whoever
    made it. Costs what making it costs.

    Raises InvalidInput, by what is wrong first: `empty-mask`, `double-bos`, `eos-not-in-loss`,
    `training-text-changed` (the ids are not those of the training string, thinking included),
    `prompt-mismatch` (they do not start with those that serving sends), `prompt-in-loss`,
    `loss-span` (anything else than R and EOS carries loss).
    """
    training = template.render(sample)
    encoding = _encode(training, template, encoder)
    problem = _wrong_ends(example, template, encoder) or _wrong_ids(
        example, encoding, training, encoder
    )
    problem = problem or _wrong_loss(example, encoding, training, _loss_from(training, config))
    if problem:
        code, what = problem
        raise InvalidInput(f"sample {example.id!r}: {what}", code=code, sample=example.id)


_Problem = tuple[str, str]


def _wrong_ends(example: SftExample, template: ChatTemplate, encoder: Encoder) -> _Problem | None:
    """Where a sequence begins and where it stops, by the example's ids alone."""
    if all(label == IGNORED for label in example.labels):
        return "empty-mask", "no token carries loss; leave the sample out"
    first = encoder.token_id(template.bos) if template.bos else None
    # Some families call a role mark their BOS (SmolLM: <|im_start|>); each turn may have that.
    marks = {encoder.token_id(mark) for mark in template.marks} - {first}
    starts = {encoder.bos_id, first} - marks - {None}
    found = [i for i, token in enumerate(example.input_ids) if token in starts]
    if found != ([] if first is None else [0]):
        wanted = "none" if first is None else f"one {template.bos}, at the start"
        return "double-bos", (
            f"expected {wanted}, found BOS tokens at positions {found[:5]}; encode the training "
            "string without adding special tokens, and take BOS marks out of the texts"
        )
    if example.labels[-1] != encoder.token_id(template.eos):
        return "eos-not-in-loss", (
            f"the last label is not {template.eos}, so the model would not learn to stop; mask "
            "padding by position, and do not cut samples"
        )
    return None


def _wrong_ids(
    example: SftExample, encoding: Encoding, training: TrainingText, encoder: Encoder
) -> _Problem | None:
    if example.input_ids != encoding.ids or len(example.labels) != len(encoding.ids):
        return "training-text-changed", (
            "its ids are not those of the training string with the whole thinking; encode the "
            "string of the template as it is"
        )
    prompt = encoder.encode(training.text[: training.loss_from]).ids
    if example.input_ids[: len(prompt)] != prompt:
        return "prompt-mismatch", (
            "its ids do not start with those of the serving prompt; take a tokenizer that cuts "
            "texts at control tokens"
        )
    return None


def _wrong_loss(
    example: SftExample, encoding: Encoding, training: TrainingText, loss_from: int
) -> _Problem | None:
    rows = list(zip(example.labels, encoding.ids, encoding.spans, strict=True))
    if any(label != IGNORED and span[0] < loss_from for label, _, span in rows):
        return "prompt-in-loss", "tokens of the prompt carry loss; mask them by position"
    whole = all(label == token for label, token, span in rows if span[0] >= loss_from)
    reached = 0
    for start, end in encoding.spans:
        whole = whole and start <= reached
        reached = max(reached, end)
    if not whole:
        return "loss-span", "the labels do not spell the rest of the thinking, the answer and EOS"
    return None


def drop_reason(
    sample: SftSample, example: SftExample, config: TrainConfig
) -> Literal["too-long", "empty-cot"] | None:
    """Why a sample is not trained on; None when it is.

    `empty-cot` wins over `too-long`. A sample of exactly `max_seq_length` tokens is kept.
    """
    if config.drop_empty_cot and not sample.cot.strip():
        return "empty-cot"
    return "too-long" if len(example.input_ids) > config.max_seq_length else None


def common_ids(survivors: Sequence[Collection[str]]) -> frozenset[str]:
    """The ids that no method's data lost, so that methods can be compared on the same samples."""
    return frozenset(survivors[0]).intersection(*survivors[1:]) if survivors else frozenset()


def learning_rate(step: int, total: int, config: TrainConfig, peak: float) -> float:
    """The rate of optimiser step `step`, counted from 0, of `total` (Appendix A: cosine with a
    floor, linear warm-up). Equals the `cosine_with_min_lr` of transformers.
    """
    warmup = math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return peak * (config.min_lr_rate + (1 - config.min_lr_rate) * cosine)
