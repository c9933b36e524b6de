"""The tokenizer as it is, and a run's data: checked, dropped with a ledger, split, remembered."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from asap.errors import InvalidInput, Misconfigured
from asap.sft import IGNORED, TEMPLATES, SftSample, encode_sample
from asap.train_config import TrainConfig
from asap_runtime.model_files import locate_model
from asap_trainer import encoding as module
from asap_trainer.encoding import SHOWN, Dropped, HFEncoder, check_vocabulary, prepare

TOKENIZERS = ("tiny_model_dir", "tiny_model_no_bos_dir", "tiny_model_merging_dir", "demo")
MARKS = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜end▁of▁sentence｜>")
texts = st.lists(st.text(max_size=8) | st.sampled_from([*MARKS, " \n", "é🙂漢"])).map("".join)


def config_of(**fields) -> TrainConfig:
    return TrainConfig(preset="demo", **{"held_out_share": 0, **fields})


@pytest.fixture(scope="module", params=TOKENIZERS)
def encoder(request) -> HFEncoder:
    name = request.param
    return HFEncoder.load(name if name == "demo" else request.getfixturevalue(name))


def trimming() -> HFEncoder:
    """Byte-level with offsets that leave out blanks, as in several model families."""
    tokenizer = Tokenizer(models.BPE(vocab={"Ġ": 0, "a": 1, "Ċ": 2, "Ġa": 3}, merges=[("Ġ", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return HFEncoder(tokenizer, "", None, None)


def write_data(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def triple(id, cot="First.\n\nSo it is 3.", question="1+2?", answer="3"):
    return {"id": str(id), "question": question, "cot": cot, "answer": answer}


@given(text=texts)
@settings(max_examples=60)
def test_spans_cover_all_of_the_text_in_order(encoder, text):
    encoding = encoder.encode(text)
    assert len(encoding.ids) == len(encoding.spans)
    starts = [start for start, _ in encoding.spans]
    assert starts == sorted(starts)
    covered = {place for start, end in encoding.spans for place in range(start, end)}
    assert covered == (set(range(len(text))) if encoding.ids else set())
    assert encoder.encode_all([text, "x", text]) == [encoding, encoder.encode("x"), encoding]


def test_blanks_that_a_tokenizer_leaves_out_belong_to_a_token():
    encoder, text = trimming(), " a  a\n"
    theirs = encoder._tokenizer.encode(text).offsets
    assert theirs[1:3] == [(3, 3), (4, 5)]
    assert encoder.encode(text).spans == ((0, 2), (2, 3), (3, 5), (5, 6))


def test_control_tokens_are_single_ids_and_nothing_else_is(encoder):
    ids = [encoder.token_id(mark) for mark in MARKS]
    assert None not in ids
    assert len(set(ids)) == len(MARKS)
    assert encoder.eos_id == encoder.token_id("<｜end▁of▁sentence｜>")
    assert encoder.token_id("<|im_start|>") is None
    assert encoder.token_id("") is None
    assert encoder.encode("".join(MARKS)).ids == tuple(ids)


def test_an_unknown_word_is_not_a_control_token():
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    tokenizer.add_tokens([AddedToken("<|im_end|>", normalized=False)])
    encoder = HFEncoder(tokenizer, "", None, "<|im_end|>")
    assert encoder.encode("<|im_start|>").ids == (0,)
    assert encoder.token_id("<|im_start|>") is None
    assert (encoder.bos_id, encoder.eos_id) == (None, 2)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["{", "[]", None])
def test_refuses_a_tokenizer_that_cannot_be_read(name, content, tmp_path):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(locate_model("demo", weights=False) / file, tmp_path)
    HFEncoder.load(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(Misconfigured):
        HFEncoder.load(tmp_path)


@pytest.mark.parametrize(
    "knobs", [{}, {"mask_forced_prefix": False}, {"loss_on": "all"}], ids=["default", "tag", "all"]
)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_prepares_real_traces_as_one_by_one(name, knobs, request, real_traces, tmp_path):
    model = name if name == "demo" else request.getfixturevalue(name)
    encoder, template = HFEncoder.load(model), TEMPLATES["deepseek-r1"]
    samples = [
        SftSample(trace["id"], trace["question"], trace["cot"], trace["answer"])
        for trace in real_traces[:12]
    ]
    examples = [encode_sample(one, template, encoder, config_of(**knobs)) for one in samples]
    limit = sorted(len(example.input_ids) for example in examples)[8]
    config = config_of(max_seq_length=limit, **knobs)
    path = write_data(tmp_path / "data", real_traces[:12])
    prepared = prepare([path], config, model, tmp_path / "cache")
    assert prepared.template is template
    expected = [example for example in examples if len(example.input_ids) <= limit]
    assert list(prepared.train) == expected
    assert prepared.dropped == tuple(
        Dropped(example.id, "too-long", len(example.input_ids))
        for example in examples
        if len(example.input_ids) > limit
    )
    assert prepared.dropped_by_reason == {"too-long": 3}
    lengths = [len(example.input_ids) for example in expected]
    loss = [sum(label != IGNORED for label in example.labels) for example in expected]
    assert prepared.tokens_per_sample == pytest.approx(sum(lengths) / len(lengths))
    assert prepared.response_tokens_per_sample == pytest.approx(sum(loss) / len(loss))


def test_the_labels_spell_the_response_and_eos(real_traces, tmp_path):
    trace = real_traces[0]
    path = write_data(tmp_path / "data", [trace])
    [example] = prepare([path], config_of(), "demo", tmp_path / "cache").train
    tokenizer = Tokenizer.from_file(str(locate_model("demo", weights=False) / "tokenizer.json"))
    labels = [label for label in example.labels if label != IGNORED]
    spelled = tokenizer.decode(labels, skip_special_tokens=False)
    assert spelled == f"{trace['cot']}\n</think>\n{trace['answer']}<｜end▁of▁sentence｜>"
    assert example.input_ids.count(tokenizer.token_to_id("<｜begin▁of▁sentence｜>")) == 1


def test_the_same_data_is_tokenised_once(tmp_path):
    path, cache = write_data(tmp_path / "data", map(triple, range(9))), tmp_path / "cache"
    first = prepare([path], config_of(), "demo", cache)
    [file] = cache.iterdir()
    inode, content = file.stat().st_ino, file.read_bytes()
    again = prepare([path], config_of(epochs=3, seed=1), "demo", cache)  # of no matter to tokens
    assert [*cache.iterdir()] == [file]
    assert file.stat().st_ino == inode
    assert list(first.train) == list(again.train)
    assert first.data_sha256 == again.data_sha256
    file.write_bytes(content[:-100])
    assert list(prepare([path], config_of(), "demo", cache).train) == list(first.train)
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    "change",
    [
        {"max_seq_length": 1000},
        {"loss_on": "all"},
        {"mask_forced_prefix": False},
        {"drop_empty_cot": False},
        {"data": "other"},
        {"tokenizer": "other"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_matters_to_tokens_is_tokenised_again(change, tmp_path):
    cache, model = tmp_path / "cache", tmp_path / "model"
    shutil.copytree(locate_model("demo", weights=False), model)
    prepare([write_data(tmp_path / "data", [triple(1)])], config_of(), model, cache)
    if change.pop("data", None):
        write_data(tmp_path / "data", [triple(1, answer="4")])
    if change.pop("tokenizer", None):
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        tokenizer.add_tokens(["So it"])
        tokenizer.save(str(model / "tokenizer.json"))
    prepare([tmp_path / "data"], config_of(**change), model, cache)
    assert len([*cache.iterdir()]) == 2


def test_another_version_tokenises_again(tmp_path, monkeypatch):
    path, cache = write_data(tmp_path / "data", [triple(1)]), tmp_path / "cache"
    prepare([path], config_of(), "demo", cache)
    monkeypatch.setattr(module, "_versions", lambda: ["another"])
    prepare([path], config_of(), "demo", cache)
    assert len([*cache.iterdir()]) == 2


def test_the_ledger_names_each_dropped_sample(tmp_path):
    rows = [triple(1), triple("é", cot=" "), triple(3, cot="long " * 50)]
    path = write_data(tmp_path / "data", rows)
    prepared = prepare([path], config_of(max_seq_length=40), "demo", tmp_path / "cache")
    lines = [json.loads(line) for line in prepared.ledger.splitlines()]
    assert [(line["id"], line["reason"]) for line in lines] == [
        ("é", "empty-cot"),
        ("3", "too-long"),
    ]
    assert lines[1]["tokens"] > 40
    whole = prepare([path], config_of(drop_empty_cot=False), "demo", tmp_path / "cache")
    assert whole.ledger == ""


def test_a_sample_is_trained_on_once(tmp_path):
    """What is pruned may hold the same trace twice, and still becomes a model by one request."""
    path = write_data(tmp_path / "data", [triple(1), triple(2), triple(1), triple(1)])
    for _ in range(2):  # also from the cache
        prepared = prepare([path], config_of(), "demo", tmp_path / "cache")
        assert prepared.train.ids == ["1", "2"]
        assert prepared.dropped_by_reason == {"duplicate": 2}
        assert [one.id for one in prepared.dropped] == ["1", "1"]


def test_a_model_that_lacks_tokens_of_its_tokenizer_is_refused(tmp_path):
    """Whoever adds tokens to a tokenizer easily forgets the model's embeddings."""
    prepared = prepare(
        [write_data(tmp_path / "data", [triple(1)])], config_of(), "demo", tmp_path / "cache"
    )
    largest = max(prepared.train[0].input_ids)
    base = tmp_path / "base"
    base.mkdir()
    for written in ({}, {"vocab_size": largest + 1}):
        (base / "config.json").write_text(json.dumps(written))
        check_vocabulary(prepared, base)
    for written in ({"vocab_size": largest}, {"text_config": {"vocab_size": largest}}):
        (base / "config.json").write_text(json.dumps(written))
        with pytest.raises(Misconfigured, match="embeddings"):
            check_vocabulary(prepared, base)


def test_only_what_survives_everywhere_is_trained_on(tmp_path):
    long = "So.\n\n" * 200
    ours = write_data(tmp_path / "a", [triple(1), triple(2, long), triple(3), triple(4), triple(5)])
    theirs = write_data(tmp_path / "b", [triple(3), triple(2), triple(1, long), triple(4, " ")])
    others = write_data(tmp_path / "c", map(triple, range(9)))
    prepared = prepare(
        [ours], config_of(max_seq_length=100), "demo", tmp_path / "cache", [theirs, others]
    )
    assert prepared.train.ids == ["3"]
    assert {(sample.id, sample.reason) for sample in prepared.dropped} == {
        ("1", "not-common"),
        ("2", "too-long"),
        ("4", "not-common"),
        ("5", "not-common"),
    }


def test_the_split_follows_from_seed_and_id_alone(tmp_path):
    def held_out(name, ids, **knobs):
        config = config_of(**{"held_out_share": 0.2, **knobs})
        path = write_data(tmp_path / name, map(triple, ids))
        prepared = prepare([path], config, "demo", tmp_path / "cache")
        assert sorted(prepared.train.ids + prepared.held_out.ids) == sorted(map(str, ids))
        return set(prepared.held_out.ids)

    all_of_them = held_out("all", range(200))
    assert 20 <= len(all_of_them) <= 60
    assert held_out("reversed", range(199, -1, -1)) == all_of_them
    half = {str(n) for n in range(0, 200, 2)}
    assert held_out("half", range(0, 200, 2)) == all_of_them & half
    assert held_out("all", range(200), seed=43) != all_of_them
    assert held_out("all", range(200), held_out_share=0) == set()
    assert len(held_out("two", range(2), held_out_share=0.001)) == 1
    assert len(held_out("two", range(2), held_out_share=0.999)) == 1
    assert held_out("one", range(1)) == set()


def test_several_files_are_one_data_set(tmp_path):
    one = write_data(tmp_path / "a", [triple(1)])
    two = write_data(tmp_path / "b", [triple(2)])
    both = prepare([one, two], config_of(), "demo", tmp_path / "cache")
    assert both.train.ids == ["1", "2"]
    alone = prepare([one], config_of(), "demo", tmp_path / "cache")
    swapped = prepare([two, one], config_of(), "demo", tmp_path / "cache")
    assert len({both.data_sha256, alone.data_sha256, swapped.data_sha256}) == 3
    with pytest.raises(InvalidInput, match="two of the files"):
        prepare([one, one], config_of(), "demo", tmp_path / "cache")


def refusal(tmp_path, rows, config=None, model="demo", common_with=()):
    path = write_data(tmp_path / "data", rows)
    with pytest.raises(InvalidInput) as caught:
        prepare([path], config or config_of(), model, tmp_path / "cache", common_with)
    return caught.value


def test_refuses_to_train_on_nothing(tmp_path):
    assert "no sample" in refusal(tmp_path, []).detail
    rows = [triple(1, ""), triple(2, "So.\n\n" * 200), triple(3, "So.\n\n" * 300)]
    error = refusal(tmp_path, rows, config_of(max_seq_length=64))
    assert error.problem_code == "nothing-to-train"
    assert "none of 3 samples is left to train on: 1 empty-cot, 2 too-long" in error.detail
    assert "max_seq_length is 64" in error.detail
    other = write_data(tmp_path / "other", [triple(9)])
    error = refusal(tmp_path, [triple(1)], common_with=[other])
    assert "1 not-common; ids must be the same" in error.detail


def test_an_empty_cot_is_trained_on_when_asked_for(tmp_path):
    path = write_data(tmp_path / "data", [triple(1, "")])
    prepared = prepare([path], config_of(drop_empty_cot=False), "demo", tmp_path / "cache")
    assert prepared.train.ids == ["1"]


def test_an_example_that_would_train_on_something_else_stops_the_run(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(locate_model("demo", weights=False), model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["bos_token"] = {"content": "<think>"}  # a second BOS in every string
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    error = refusal(tmp_path, [triple("x1")], model=model)
    assert error.problem_code == "double-bos"
    assert "x1" in error.detail
    assert not [*(tmp_path / "cache").iterdir()]


def test_a_bad_line_stops_the_run_and_is_remembered_nowhere(tmp_path):
    error = refusal(tmp_path, [triple(1), {"id": "2"}])
    assert error.detail.startswith("line 2 of 'data': ")
    assert not [*(tmp_path / "cache").iterdir()]


def test_the_text_of_the_first_samples_is_kept(tmp_path):
    rows = [triple("long", "So.\n\n" * 200), *map(triple, range(SHOWN + 5))]
    config = config_of(max_seq_length=64)
    path = write_data(tmp_path / "data", rows)
    train = prepare([path], config, "demo", tmp_path / "cache").train
    kept = [train.text(n) for n in range(len(train))]
    assert all(text.endswith("<｜end▁of▁sentence｜>") for text in kept[:SHOWN])
    assert kept[SHOWN:] == [None] * 5
