"""Samples to what a model is fed: the base model's own tokenizer, and a run's data made ready."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from operator import lt
from pathlib import Path
from typing import Any, NamedTuple, Self

import tokenizers

from asap.errors import InvalidInput, Misconfigured
from asap.sft import (
    ChatTemplate,
    Encoder,
    Encoding,
    SftSample,
    check_example,
    common_ids,
    drop_reason,
    encode_sample,
    template_for,
)
from asap.train_config import TrainConfig
from asap_runtime.model_files import locate_model
from asap_trainer.samples import read_samples
from asap_trainer.token_cache import Examples, TokenCache, TokenFile, TokenRow, key_of, sha256_of

__all__ = [
    "DUPLICATE",
    "NOT_COMMON",
    "Dropped",
    "HFEncoder",
    "Prepared",
    "check_vocabulary",
    "prepare",
]

NOT_COMMON = "not-common"
"""Reason of a sample that another method's data has lost."""
DUPLICATE = "duplicate"
"""Reason of a sample that stood in the file before."""
BATCH = 64
"""Samples tokenised at a time, on all cores."""
SHOWN = 32
"""Samples of a data file, from its start, whose text is kept to be shown."""


class HFEncoder:
    """The tokenizer of a model directory, `tokenizer.json` as it is. Safe to share between threads.

    Args:
        tokenizer: without padding and truncation.
        sha256: of its file.
        bos, eos: tokens that the model's files name so.
    """

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, sha256: str, bos: str | None, eos: str | None
    ) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer, self.sha256 = tokenizer, sha256
        self._ids: dict[str, int | None] = {}
        self.bos_id = None if bos is None else self.token_id(bos)
        self.eos_id = None if eos is None else self.token_id(eos)

    @classmethod
    def load(cls, model: str | Path) -> Self:
        """The tokenizer of a local directory, a hub name or "demo". Raises Misconfigured."""
        directory = locate_model(str(model), weights=False)
        path = directory / "tokenizer.json"
        try:
            settings = json.loads((directory / "tokenizer_config.json").read_text("utf-8"))
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
            marks = [_token(settings.get(name)) for name in ("bos_token", "eos_token")]
        except Exception as error:  # the Rust side raises nothing narrower
            raise Misconfigured(
                f"cannot read tokenizer.json and tokenizer_config.json of model {str(model)!r}",
                model=str(model),
            ) from error
        return cls(tokenizer, sha256_of(path), *marks)

    def token_id(self, token: str) -> int | None:
        """Id of a control token; None when the text is not exactly one token."""
        if token not in self._ids:
            ids = self._tokenizer.encode(token, add_special_tokens=False).ids
            known = self._tokenizer.token_to_id(token)
            self._ids[token] = known if ids == [known] else None
        return self._ids[token]

    def encode(self, text: str) -> Encoding:
        """All of the text, nothing added, nothing cut off."""
        return _encoding(self._tokenizer.encode(text, add_special_tokens=False), text)

    def encode_all(self, texts: Sequence[str]) -> list[Encoding]:
        """`encode` of each text, on all cores."""
        found = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [_encoding(one, text) for one, text in zip(found, texts, strict=True)]


def _token(value: Any) -> str | None:
    """A token of tokenizer_config.json, which may be an object with the text in it."""
    text: str | None = value["content"] if isinstance(value, dict) else value
    return text


def _encoding(found: tokenizers.Encoding, text: str) -> Encoding:
    """Spans as the core wants them: some tokenizers leave blanks out of theirs, which then belong
    to the token behind them, or to the last one.
    """
    spans = found.offsets
    starts, ends = zip(*spans, strict=True) if spans else ((), ())
    if spans and (starts[0] > 0 or ends[-1] < len(text) or any(map(lt, ends, starts[1:]))):
        reached, whole = 0, []
        for start, end in spans:
            whole.append((min(start, reached), end))
            reached = max(reached, end)
        spans = [*whole[:-1], (whole[-1][0], len(text))]
    return Encoding(tuple(found.ids), tuple(spans))


class _Ahead:
    """An encoder that has encoded these texts before it is asked, all at once."""

    def __init__(self, encoder: HFEncoder, texts: Sequence[str]) -> None:
        self._encoder = encoder
        self._known = dict(zip(texts, encoder.encode_all(texts), strict=True))
        self.bos_id, self.eos_id = encoder.bos_id, encoder.eos_id
        self.token_id = encoder.token_id

    def encode(self, text: str) -> Encoding:
        return self._known.get(text) or self._encoder.encode(text)


class Dropped(NamedTuple):
    """A sample that is not trained on."""

    id: str
    reason: str
    """`too-long`, `empty-cot`, `duplicate` or `not-common`."""
    tokens: int
    """Of the whole sample."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run's data, checked and ready; the same for the same files, config and tokenizer."""

    train: Examples
    held_out: Examples
    dropped: tuple[Dropped, ...]
    """Every sample that is in neither, in the order of the files."""
    template: ChatTemplate
    data_sha256: str
    """Of the data file; of several, of their digests in order."""

    @property
    def dropped_by_reason(self) -> dict[str, int]:
        """Number of dropped samples by reason."""
        return dict(Counter(sample.reason for sample in self.dropped))

    @property
    def ledger(self) -> str:
        """The dropped samples, a JSON object on a line for each."""
        rows = (json.dumps(sample._asdict(), ensure_ascii=False) for sample in self.dropped)
        return "".join(f"{row}\n" for row in rows)

    @property
    def tokens_per_sample(self) -> float:
        """Mean tokens of a sample that is trained on, prompt included."""
        return float(self.train.tokens.mean())

    @property
    def response_tokens_per_sample(self) -> float:
        """Mean tokens that carry loss, of the same samples."""
        return float(self.train.loss_tokens.mean())


def prepare(
    paths: Sequence[Path],
    config: TrainConfig,
    model_dir: str | Path,
    cache_dir: Path,
    common_with: Sequence[Path] = (),
) -> Prepared:
    """Read, encode, check, drop and split the data; encodings of known files come from the cache.

    Args:
        paths: the data, one file at least, in this order.
        config: of the run; the split follows from `held_out_share`, `seed` and each id alone, so
            that a sample held out from one method's data is held out from every other's.
        model_dir: whose tokenizer it is; as for `HFEncoder.load`.
        cache_dir: may be shared by runs; nothing in it is deleted.
        common_with: other methods' data; only ids that survive in every one of them are trained on.

    Raises:
        InvalidInput: a line, a sample or an id that cannot be trained on, or none is left.
        Misconfigured: the tokenizer and the template do not fit.
        NotFound: a file cannot be read.
    """
    encoder = HFEncoder.load(model_dir)
    template = template_for(config.template, encoder)
    cache = TokenCache(cache_dir)

    def token_file(path: Path) -> tuple[str, TokenFile]:
        sha256 = sha256_of(path)
        key = _key(sha256, encoder, template, config)
        if (found := cache.get(key)) is not None:
            return sha256, found
        with closing(read_samples(path)) as samples:
            return sha256, cache.put(key, _rows(samples, template, encoder, config))

    digests, files = zip(*map(token_file, paths), strict=True)
    survivors = [_survivors(files)]
    survivors += [_survivors([token_file(path)[1]]) for path in common_with]
    kept, dropped = _sorted_out(files, common_ids(survivors))
    if not kept:
        raise _nothing_left(dropped, config)
    held_out = _held_out([file.ids[row] for file, row in kept], config)
    joined = hashlib.sha256("".join(digests).encode()).hexdigest()
    return Prepared(
        train=Examples([place for place, out in zip(kept, held_out, strict=True) if not out]),
        held_out=Examples([place for place, out in zip(kept, held_out, strict=True) if out]),
        dropped=tuple(dropped),
        template=template,
        data_sha256=digests[0] if len(digests) == 1 else joined,
    )


def _key(sha256: str, encoder: HFEncoder, template: ChatTemplate, config: TrainConfig) -> str:
    """Whatever the tokens of a file follow from."""
    text = template.render(SftSample("", "question", "cot", "answer"))
    chosen = {"max_seq_length", "drop_empty_cot", "loss_on", "mask_forced_prefix"}
    marks = [encoder.sha256, encoder.bos_id, encoder.eos_id]
    form = [text.text, text.loss_from, text.loss_to, SHOWN]
    return key_of([sha256, marks, form, config.model_dump(include=chosen), _versions()])


def _versions() -> list[str]:
    """Of what reads, checks and encodes: a later one may do it differently."""
    return [importlib.metadata.version("asap-cot"), tokenizers.__version__]


def check_vocabulary(prepared: Prepared, base: Path) -> None:
    """Raise Misconfigured when the tokenizer gives ids that the base model's config has no room
    for: the first step would fail by them.
    """
    config = json.loads((base / "config.json").read_text("utf-8"))
    rows = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    largest = max(part.largest_id for part in (prepared.train, prepared.held_out))
    if rows is not None and largest >= rows:
        raise Misconfigured(
            f"the tokenizer gives ids up to {largest:,}, and the base model's embeddings have "
            f"{rows:,} rows; resize them to the tokenizer (resize_token_embeddings of "
            "transformers) before the training"
        )


def _rows(
    samples: Iterable[SftSample], template: ChatTemplate, encoder: HFEncoder, config: TrainConfig
) -> Iterator[TokenRow]:
    """Each sample encoded and checked, or dropped."""
    source, shown = iter(samples), 0
    seen: set[str] = set()
    while batch := list(islice(source, BATCH)):
        texts = [template.render(sample).text for sample in batch]
        prompts = [template.prompt(sample.question) for sample in batch]
        ahead: Encoder = _Ahead(encoder, [*texts, *prompts])
        for sample, text in zip(batch, texts, strict=True):
            example = encode_sample(sample, template, ahead, config)
            tokens = len(example.input_ids)
            again = DUPLICATE if sample.id in seen else None
            seen.add(sample.id)
            if reason := again or drop_reason(sample, example, config):
                yield TokenRow(sample.id, tokens, None, reason)
                continue
            check_example(example, sample, template, ahead, config)
            yield TokenRow(sample.id, tokens, example, None, text if shown < SHOWN else None)
            shown += 1


def _survivors(files: Sequence[TokenFile]) -> set[str]:
    return {
        id
        for file in files
        for id, reason in zip(file.ids, file.reasons, strict=True)
        if reason is None
    }


def _sorted_out(
    files: Sequence[TokenFile], common: frozenset[str]
) -> tuple[list[tuple[TokenFile, int]], list[Dropped]]:
    """Where the samples to train on are, and the others with their reason."""
    kept, dropped = [], []
    seen: set[str] = set()
    for file in files:
        for row, (id, reason) in enumerate(zip(file.ids, file.reasons, strict=True)):
            if id in seen and reason != DUPLICATE:
                raise InvalidInput(
                    f"id {id[:64]!r} stands in two of the files; give each sample an id of its own"
                )
            seen.add(id)
            reason = reason or (None if id in common else NOT_COMMON)
            if reason is None:
                kept.append((file, row))
            else:
                dropped.append(Dropped(id, reason, int(file.tokens[row])))
    return kept, dropped


def _nothing_left(dropped: Sequence[Dropped], config: TrainConfig) -> InvalidInput:
    if not dropped:
        return InvalidInput("the data holds no sample", code="nothing-to-train")
    reasons = Counter(sample.reason for sample in dropped)
    detail = f"none of {len(dropped):,} samples is left to train on: " + ", ".join(
        f"{count:,} {reason}" for reason, count in sorted(reasons.items())
    )
    if "too-long" in reasons:
        shortest = min(sample.tokens for sample in dropped if sample.reason == "too-long")
        detail += (
            f"; the shortest too long one has {shortest:,} tokens, max_seq_length is "
            f"{config.max_seq_length:,}"
        )
    if NOT_COMMON in reasons:
        detail += (
            "; ids must be the same in every method's data, and rows without an id get one from "
            "their text, pruned thinking included"
        )
    return InvalidInput(detail, code="nothing-to-train")


def _held_out(ids: Sequence[str], config: TrainConfig) -> list[bool]:
    """For each id whether it is held out: one at least, and never all of them."""
    share = config.held_out_share
    if not share or len(ids) < 2:
        return [False] * len(ids)
    draws = [hashlib.sha256(f"{config.seed}:{id}".encode()).digest() for id in ids]
    chosen = [int.from_bytes(draw[:8], "big") < share * 2**64 for draw in draws]
    chosen[draws.index(min(draws))] = True
    chosen[draws.index(max(draws))] = False
    return chosen
