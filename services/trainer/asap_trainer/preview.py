"""What a run will be trained on, before it is: figures of its tokens, and where the loss lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from asap.chat_templates import FORCED_PREFIX
from asap.sft import IGNORED, Encoder, SftExample
from asap_trainer.encoding import Prepared

__all__ = ["Piece", "Spread", "TokenStatistics", "preview_samples", "token_statistics"]


class Spread(NamedTuple):
    """Figures of a list of token counts; each but the mean is one of them."""

    mean: float
    p50: int
    p95: int
    max: int


@dataclass(frozen=True, slots=True)
class TokenStatistics:
    """Tokens of the samples that are trained on."""

    count: int
    held_out: int
    sample: Spread
    """Prompt included."""
    response: Spread
    """Of them those that carry loss."""
    dropped: dict[str, int]
    """Samples by reason."""


class Piece(NamedTuple):
    """Part of a training text."""

    text: str
    carries_loss: bool


def token_statistics(prepared: Prepared) -> TokenStatistics:
    """Figures over the prepared data, without a look at its tokens."""
    return TokenStatistics(
        count=len(prepared.train),
        held_out=len(prepared.held_out),
        sample=_spread(prepared.train.tokens),
        response=_spread(prepared.train.loss_tokens),
        dropped=prepared.dropped_by_reason,
    )


def _spread(counts: Any) -> Spread:
    p50, p95 = np.percentile(counts, [50, 95], method="inverted_cdf")
    return Spread(float(counts.mean()), int(p50), int(p95), int(counts.max()))


def preview_samples(prepared: Prepared, encoder: Encoder, n: int = 5) -> list[list[Piece]]:
    """The first `n` samples as pieces that add up to the training text; by the labels themselves.

    Fewer where fewer texts were kept. Raises ValueError when the encoder is not the one that the
    data was prepared with.
    """
    previews: list[list[Piece]] = []
    for index in range(len(prepared.train)):
        if len(previews) >= n:
            break
        text = prepared.train.text(index)
        if text is not None:
            start = _loss_start(prepared.train[index], text, encoder)
            pieces = [Piece(text[:start], False), Piece(text[start:], True)]
            previews.append([piece for piece in pieces if piece.text])
    return previews


def _loss_start(example: SftExample, text: str, encoder: Encoder) -> int:
    """Code point at which the first label stands; loss goes on from there to the end."""
    masked = sum(label == IGNORED for label in example.labels)
    encoding, end = encoder.encode(text), len(text)
    if encoding.ids != example.input_ids:
        # a tokenizer that would merge prompt and thinking has encoded each by itself
        end = text.index(FORCED_PREFIX) + len(FORCED_PREFIX)
        encoding = encoder.encode(text[:end])
    if encoding.ids != example.input_ids[: len(encoding.ids)]:
        raise ValueError("the text and the tokens of a sample do not belong together")
    starts = [start for start, _ in encoding.spans]
    return starts[masked] if masked < len(starts) else end
