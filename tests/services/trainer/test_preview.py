"""What is shown before a run is what the run trains on."""

from __future__ import annotations

import json

import pytest

from asap.sft import SftSample
from asap.train_config import TrainConfig
from asap_trainer.encoding import HFEncoder, prepare
from asap_trainer.preview import Piece, Spread, preview_samples, token_statistics

TOKENIZERS = ("tiny_model_dir", "tiny_model_no_bos_dir", "tiny_model_merging_dir", "demo")


@pytest.fixture
def prepared_of(tmp_path):
    def prepared_of(rows, model="demo", **knobs):
        config = TrainConfig(**{"preset": "demo", "held_out_share": 0, **knobs})
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return prepare([path], config, model, tmp_path / "cache")

    return prepared_of


def triple(id, cot):
    return {"id": str(id), "question": "1+2?", "cot": cot, "answer": "3"}


@pytest.mark.parametrize(
    ("knobs", "loss_from"),
    [
        ({}, "{cot}"),
        ({"mask_forced_prefix": False}, "<think>\n{cot}"),
        ({"loss_on": "all"}, "{prompt}{cot}"),
    ],
    ids=["default", "tag", "all"],
)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_pieces_are_the_training_text(
    name, knobs, loss_from, request, prepared_of, real_traces
):
    model = name if name == "demo" else request.getfixturevalue(name)
    # the last ones begin with what a tokenizer might merge with the newline behind <think>
    rows = [
        *real_traces[:3],
        triple("n", "\n\nSo it is 3."),
        triple("b", "  So"),
        triple("e", "é🙂"),
    ]
    prepared = prepared_of(rows, model, max_seq_length=10**5, **knobs)
    previews = preview_samples(prepared, HFEncoder.load(model), n=10)
    assert len(previews) == len(rows)
    for row, pieces in zip(rows, previews, strict=True):
        sample = SftSample(row["id"], row["question"], row["cot"], row["answer"])
        training, prompt = prepared.template.render(sample), prepared.template.prompt("")
        prompt = training.text[: training.loss_from]
        with_loss = loss_from.format(cot=row["cot"], prompt=prompt)
        assert "".join(piece.text for piece in pieces) == training.text
        assert [piece.carries_loss for piece in pieces] in ([False, True], [True])
        assert pieces[-1].text == f"{with_loss}\n</think>\n{row['answer']}<｜end▁of▁sentence｜>"


def test_as_many_as_asked_for(prepared_of):
    prepared = prepared_of([triple(n, f"So {n}.") for n in range(7)])
    encoder = HFEncoder.load("demo")
    assert [len(preview_samples(prepared, encoder, n)) for n in (0, 1, 7, 8)] == [0, 1, 7, 7]
    assert len(preview_samples(prepared, encoder)) == 5
    [[_, piece]] = preview_samples(prepared, encoder, 1)
    assert piece == Piece("So 0.\n</think>\n3<｜end▁of▁sentence｜>", True)


def test_another_tokenizer_is_noticed(prepared_of, tiny_model_dir):
    prepared = prepared_of([triple(1, "So it is 3.")])
    with pytest.raises(ValueError, match="do not belong together"):
        preview_samples(prepared, HFEncoder.load(tiny_model_dir))


def test_figures_by_hand(prepared_of):
    steps = [1, 2, 3, 4, 200]
    rows = [triple(n, "\n\n".join(["So it is 3."] * n)) for n in steps]
    prepared = prepared_of([*rows, triple("empty", " ")], max_seq_length=1000)
    figures = token_statistics(prepared)
    assert (figures.count, figures.held_out) == (4, 0)
    assert figures.dropped == {"too-long": 1, "empty-cot": 1}
    lengths = sorted(len(example.input_ids) for example in prepared.train)
    prompt = len(HFEncoder.load("demo").encode(prepared.template.prompt("1+2?")).ids)
    mean = sum(lengths) / 4
    assert figures.sample == Spread(mean, lengths[1], lengths[3], lengths[3])
    response = [length - prompt for length in lengths]
    assert figures.response == Spread(mean - prompt, response[1], response[3], response[3])


def test_figures_are_of_what_is_trained_on(prepared_of):
    prepared = prepared_of([triple(n, f"So {n}.") for n in range(20)], held_out_share=0.3)
    figures = token_statistics(prepared)
    assert figures.count == len(prepared.train)
    assert figures.held_out == len(prepared.held_out) > 0
    assert figures.sample.mean == prepared.tokens_per_sample
