from __future__ import annotations

import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import asap_runtime.demo_model
from asap.errors import InvalidInput
from asap.sft import (
    IGNORED,
    TEMPLATES,
    Encoding,
    SftExample,
    SftSample,
    check_example,
    common_ids,
    drop_reason,
    encode_sample,
    learning_rate,
    template_for,
)
from asap.thinking import CONTROL_TOKENS
from asap.train_config import TrainConfig
from file_encoder import FileEncoder
from strategies import any_texts

DEMO = Path(asap_runtime.demo_model.__file__).parent
DEEPSEEK, CHATML = TEMPLATES["deepseek-r1"], TEMPLATES["chatml"]
SAMPLE = SftSample("a", "Add 1 and 2.", "So x is 3.\n\nWait, let me check.", "It is 3.")
CONFIG = TrainConfig()
CONFIGS = (
    CONFIG,
    TrainConfig(mask_forced_prefix=False),
    TrainConfig(loss_on="all"),
)
# Unassigned characters are left out: Python and the tokenizer may know different ones.
characters = st.characters(exclude_categories=("Cs", "Cn"))


def is_ordinary(text: str) -> bool:
    return not any(token in text for token in CONTROL_TOKENS)


texts = st.one_of(
    st.text(characters, max_size=60),
    any_texts.filter(lambda text: unicodedata.normalize("NFC", text) == text),
    st.sampled_from(
        ["", "\n", "\n\nx", "x\n\n", " \n x", "\t\n", "    x = 1\n", "🙂\n", "\u0301e"]
    ),
)
samples = st.builds(SftSample, st.just("a"), *[texts.filter(is_ordinary)] * 3)


@pytest.fixture(scope="module")
def encoders(tiny_model_dir, tiny_model_no_bos_dir, tiny_model_merging_dir):
    folders = {
        "bos": tiny_model_dir,
        "no_bos": tiny_model_no_bos_dir,
        "merging": tiny_model_merging_dir,
        "demo": DEMO,
    }
    plain = {name: FileEncoder(folder) for name, folder in folders.items()}
    chatml = {f"{name}_chatml": FileEncoder.chatml(folder) for name, folder in folders.items()}
    return plain | chatml


KINDS = [
    f"{name}{form}" for name in ("bos", "no_bos", "merging", "demo") for form in ("", "_chatml")
]
BYTE_LEVEL = [kind for kind in KINDS if not kind.startswith("merging")]


def template_of(kind: str):
    return CHATML if kind.endswith("_chatml") else DEEPSEEK


def labelled(example: SftExample) -> list[int]:
    return [label for label in example.labels if label != IGNORED]


def response(sample: SftSample, template) -> str:
    return f"{sample.cot}\n</think>\n{sample.answer}{template.eos}"


# What carries loss


@pytest.mark.parametrize("kind", BYTE_LEVEL)
@given(sample=samples)
def test_labels_decode_to_the_response_and_eos(kind, encoders, sample):
    encoder, template = encoders[kind], template_of(kind)
    expected = {
        CONFIGS[0]: response(sample, template),
        CONFIGS[1]: f"<think>\n{response(sample, template)}",
        CONFIGS[2]: template.render(sample).text,
    }
    for config, text in expected.items():
        example = encode_sample(sample, template, encoder, config)
        decoded = encoder.tokenizer.decode(labelled(example), skip_special_tokens=False)
        assert decoded == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("kind", KINDS)
@given(sample=samples, config=st.sampled_from(CONFIGS))
def test_every_example_passes_the_guards(kind, encoders, sample, config):
    encoder, template = encoders[kind], template_of(kind)
    example = encode_sample(sample, template, encoder, config)
    check_example(example, sample, template, encoder, config)
    assert example.labels[-1] == encoder.eos_id
    masked = sum(label == IGNORED for label in example.labels)
    assert example.labels[:masked] == (IGNORED,) * masked
    assert example.labels[masked:] == example.input_ids[masked:]


@pytest.mark.parametrize("kind", KINDS)
@given(sample=samples)
def test_the_masked_ids_are_those_that_serving_sends(kind, encoders, sample):
    encoder, template = encoders[kind], template_of(kind)
    example = encode_sample(sample, template, encoder, CONFIG)
    served = encoder.encode(template.prompt(sample.question)).ids
    assert example.input_ids[: len(served)] == served
    assert set(example.labels[: len(served)]) == {IGNORED}
    assert IGNORED not in example.labels[len(served) :]


def test_the_forced_prefix_carries_loss_only_when_asked(encoders):
    encoder = encoders["demo"]
    prefix = encoder.encode("<think>\n").ids
    with_prefix, without = (
        labelled(encode_sample(SAMPLE, DEEPSEEK, encoder, TrainConfig(mask_forced_prefix=mask)))
        for mask in (False, True)
    )
    assert tuple(with_prefix[: len(prefix)]) == prefix
    assert with_prefix[len(prefix) :] == without


def test_an_eos_that_doubles_as_padding_keeps_its_loss(encoders):
    encoder = encoders["bos"]
    assert encoder.tokenizer.token_to_id(DEEPSEEK.eos) == encoder.eos_id  # the pad token as well
    example = encode_sample(SAMPLE, DEEPSEEK, encoder, CONFIG)
    assert example.labels[-1] == example.input_ids[-1] == encoder.eos_id


def test_an_empty_thinking_is_an_empty_line(encoders):
    empty = replace(SAMPLE, cot="")
    assert DEEPSEEK.render(empty).text.endswith(
        "<think>\n\n</think>\nIt is 3.<｜end▁of▁sentence｜>"
    )
    encoder = encoders["demo"]
    merged = encoder.encode("\n\n").ids
    assert len(merged) == 1  # so that one token holds the prompt's last newline and C's
    example = encode_sample(empty, DEEPSEEK, encoder, CONFIG)
    assert merged[0] not in example.input_ids
    assert labelled(example)[:2] == [*encoder.encode("\n").ids, encoder.token_id("</think>")]


class Merging:
    """One id a character, but a newline is one token with the character behind it."""

    bos_id, eos_id = None, 1
    marks = ("<|im_start|>", "<|im_end|>")

    def token_id(self, token):
        return self.marks.index(token) if token in self.marks else None

    def encode(self, text):
        ids, spans, at = [], [], 0
        while at < len(text):
            mark = next((mark for mark in self.marks if text.startswith(mark, at)), None)
            alone = text[at] != "\n" or text[at + 1 : at + 2] in ("", "<")
            end = at + (len(mark) if mark else 1 if alone else 2)
            ids.append(self.token_id(mark) if mark else sum(map(ord, text[at:end])) + 10)
            spans.append((at, end))
            at = end
        return Encoding(tuple(ids), tuple(spans))


class MergingTags(Merging):
    """The same, and newlines merge with tags too."""

    def encode(self, text):
        whole = super().encode(text)
        at = text.find("\n<think>")
        here = next((i for i, (start, _) in enumerate(whole.spans) if start == at), None)
        if at < 0 or here is None:
            return whole
        ids = (*whole.ids[:here], 7, *whole.ids[here + 2 :])
        spans = (*whole.spans[:here], (at, at + 2), *whole.spans[here + 2 :])
        return Encoding(ids, spans)


def test_no_token_holds_both_prompt_and_response():
    sample = SftSample("a", "Q", "xy", "A")
    example = encode_sample(sample, CHATML, Merging(), CONFIG)
    prompt = Merging().encode(CHATML.prompt("Q")).ids
    assert example.input_ids[: len(prompt)] == prompt
    assert labelled(example)[:2] == [ord("x") + 10, ord("y") + 10]
    check_example(example, sample, CHATML, Merging(), CONFIG)


def test_a_token_that_reaches_into_the_loss_belongs_to_the_prompt():
    sample, config = SftSample("a", "Q", "x", "A"), TrainConfig(mask_forced_prefix=False)
    encoder = MergingTags()
    example = encode_sample(sample, CHATML, encoder, config)
    straddling = example.input_ids.index(7)
    assert example.labels[straddling] == IGNORED
    assert example.labels[straddling + 1] == ord("t") + 10  # "<" went with the newline before it
    check_example(example, sample, CHATML, encoder, config)


@pytest.mark.parametrize("field", ["question", "cot", "answer"])
@pytest.mark.parametrize("token", CONTROL_TOKENS)
def test_texts_with_control_tokens_are_refused(field, token, encoders):
    with pytest.raises(InvalidInput, match=f"'{field}'") as caught:
        encode_sample(replace(SAMPLE, **{field: f"x{token}"}), DEEPSEEK, encoders["demo"], CONFIG)
    assert caught.value.problem_code == "control-token-in-text"


def test_real_traces_pass_the_guards(encoders, real_traces):
    encoder = encoders["demo"]
    for row in real_traces[::12]:
        sample = SftSample(row["id"], row["question"], row["cot"], row["answer"])
        example = encode_sample(sample, DEEPSEEK, encoder, CONFIG)
        check_example(example, sample, DEEPSEEK, encoder, CONFIG)
        decoded = encoder.tokenizer.decode(labelled(example), skip_special_tokens=False)
        assert decoded == unicodedata.normalize("NFC", response(sample, DEEPSEEK))


# The guards


def refusal(example, encoder, *, sample=SAMPLE, template=DEEPSEEK, config=CONFIG) -> str:
    with pytest.raises(InvalidInput, match=r"^sample 'a': ") as caught:
        check_example(example, sample, template, encoder, config)
    assert caught.value.context == {"sample": "a"}
    return caught.value.problem_code


@pytest.fixture
def good(encoders) -> SftExample:
    return encode_sample(SAMPLE, DEEPSEEK, encoders["demo"], CONFIG)


def test_refuses_a_second_bos(good, encoders):
    encoder = encoders["demo"]
    doubled = SftExample(
        "a", (encoder.bos_id, *good.input_ids), (IGNORED, *good.labels)
    )  # what encoding with special tokens makes of the string
    assert refusal(doubled, encoder) == "double-bos"


def test_refuses_a_missing_bos(good, encoders):
    headless = SftExample("a", good.input_ids[1:], good.labels[1:])
    assert refusal(headless, encoders["demo"]) == "double-bos"


def test_refuses_a_bos_where_the_template_has_none(tiny_model_dir):
    encoder = FileEncoder(tiny_model_dir, (DEEPSEEK.bos, "<|im_end|>"), CHATML.marks)
    example = encode_sample(SAMPLE, CHATML, encoder, CONFIG)
    check_example(example, SAMPLE, CHATML, encoder, CONFIG)
    added = SftExample("a", (encoder.bos_id, *example.input_ids), (IGNORED, *example.labels))
    assert refusal(added, encoder, template=CHATML) == "double-bos"


def test_refuses_a_text_that_holds_the_tokenizers_own_bos(tiny_model_dir):
    encoder = FileEncoder(tiny_model_dir, ("<s>", "<|im_end|>"), ("<s>", *CHATML.marks))
    sample = replace(SAMPLE, question="What does <s> do in HTML?")
    example = encode_sample(sample, CHATML, encoder, CONFIG)
    assert refusal(example, encoder, sample=sample, template=CHATML) == "double-bos"


def test_a_role_mark_may_be_the_tokenizers_bos(tiny_model_dir):
    encoder = FileEncoder(tiny_model_dir, CHATML.marks, CHATML.marks)
    assert encoder.bos_id == encoder.token_id("<|im_start|>")
    example = encode_sample(SAMPLE, template_for("chatml", encoder), encoder, CONFIG)
    check_example(example, SAMPLE, CHATML, encoder, CONFIG)


def test_refuses_a_mask_over_everything(good, encoders):
    nothing = replace(good, labels=(IGNORED,) * len(good.labels))
    assert refusal(nothing, encoders["demo"]) == "empty-mask"


def test_refuses_an_eos_without_loss(good, encoders):
    by_pad_id = tuple(
        IGNORED if label == encoders["demo"].eos_id else label for label in good.labels
    )
    assert refusal(replace(good, labels=by_pad_id), encoders["demo"]) == "eos-not-in-loss"


def test_refuses_a_sample_that_was_cut(good, encoders):
    cut = replace(good, input_ids=good.input_ids[:-3], labels=good.labels[:-3])
    assert refusal(cut, encoders["demo"]) == "eos-not-in-loss"


def test_refuses_loss_on_the_prompt(good, encoders):
    encoder = encoders["demo"]
    assert refusal(replace(good, labels=good.input_ids), encoder) == "prompt-in-loss"
    with_prefix = encode_sample(SAMPLE, DEEPSEEK, encoder, CONFIGS[1])
    assert refusal(with_prefix, encoder) == "prompt-in-loss"


def test_refuses_a_text_without_its_thinking(encoders):
    encoder = encoders["demo"]
    answer_only = encode_sample(replace(SAMPLE, cot=""), DEEPSEEK, encoder, CONFIG)
    assert refusal(answer_only, encoder) == "training-text-changed"


def test_refuses_labels_of_another_length(good, encoders):
    longer = replace(good, labels=(IGNORED, *good.labels))
    assert refusal(longer, encoders["demo"]) == "training-text-changed"


@pytest.mark.parametrize("where", [0, 1, -2])
def test_refuses_a_hole_in_the_loss(where, good, encoders):
    at = [i for i, label in enumerate(good.labels) if label != IGNORED][where]
    labels = (*good.labels[:at], IGNORED, *good.labels[at + 1 :])
    assert refusal(replace(good, labels=labels), encoders["demo"]) == "loss-span"


def test_refuses_a_label_that_is_not_the_token(good, encoders):
    labels = (*good.labels[:-2], good.labels[-2] + 1, good.labels[-1])
    assert refusal(replace(good, labels=labels), encoders["demo"]) == "loss-span"


def test_refuses_a_masked_prompt_where_all_is_wanted(good, encoders):
    assert refusal(good, encoders["demo"], config=CONFIGS[2]) == "loss-span"


class Trimming(FileEncoder):
    """Spans without their blanks, as some tokenizers give them."""

    def encode(self, text):
        whole = super().encode(text)
        spans = []
        for start, end in whole.spans:
            piece = text[start:end]
            left = len(piece) - len(piece.lstrip())
            spans.append((start + left, start + max(left, len(piece.rstrip()))))
        return Encoding(whole.ids, tuple(spans))


def test_refuses_spans_that_leave_blanks_out():
    encoder = Trimming(DEMO)
    example = encode_sample(SAMPLE, DEEPSEEK, encoder, CONFIG)
    assert refusal(example, encoder) == "loss-span"


class Hasty(FileEncoder):
    """A tokenizer that treats the end of a text unlike the same place within one."""

    def encode(self, text):
        whole = super().encode(text)
        if not text.endswith("<think>\n"):
            return whole
        return Encoding((*whole.ids[:-1], self.token_id("x")), whole.spans)


def test_refuses_ids_that_serving_would_not_send():
    encoder = Hasty(DEMO)
    example = encode_sample(SAMPLE, DEEPSEEK, encoder, CONFIG)
    assert refusal(example, encoder) == "prompt-mismatch"


def test_no_message_shows_a_text(good, encoders):
    secret = replace(SAMPLE, cot="hidden thought", question="hidden question")
    with pytest.raises(InvalidInput) as caught:
        check_example(good, secret, DEEPSEEK, encoders["demo"], CONFIG)
    assert "hidden" not in caught.value.detail


# What is left out


@pytest.mark.parametrize(
    ("cot", "length", "drop_empty", "reason"),
    [
        ("x", 100, True, None),
        ("x", 101, True, "too-long"),
        ("", 100, True, "empty-cot"),
        (" \n", 100, True, "empty-cot"),
        ("", 101, True, "empty-cot"),
        ("", 100, False, None),
        ("", 101, False, "too-long"),
    ],
)
def test_samples_are_dropped_for_one_reason(cot, length, drop_empty, reason):
    config = TrainConfig(max_seq_length=100, drop_empty_cot=drop_empty)
    example = SftExample("a", (1,) * length, (1,) * length)
    assert drop_reason(replace(SAMPLE, cot=cot), example, config) == reason


def test_common_ids_are_those_that_all_methods_kept():
    assert common_ids([["a", "b", "c"], {"c", "b"}, ("b", "d", "c")]) == {"b", "c"}
    assert common_ids([["a"], []]) == frozenset()
    assert common_ids([["a", "a"]]) == {"a"}
    assert common_ids([]) == frozenset()


# The schedule


@pytest.mark.parametrize("total", [1, 2, 7, 100, 250, 3333])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.03, 0.5])
def test_the_rate_is_that_of_transformers(total, warmup_ratio):
    import torch
    from transformers import TrainingArguments, get_scheduler

    config = TrainConfig(warmup_ratio=warmup_ratio)
    peak = config.peak_learning_rate("qwen2")
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    arguments = TrainingArguments(warmup_steps=warmup_ratio, report_to=[])
    scheduler = get_scheduler(
        "cosine_with_min_lr",
        optimizer,
        num_warmup_steps=arguments.get_warmup_steps(total),
        num_training_steps=total,
        scheduler_specific_kwargs={"min_lr_rate": config.min_lr_rate},
    )
    theirs = scheduler.lr_lambdas[0]
    for step in sorted({0, 1, total // 4, total // 2, total - 1, total}):
        assert learning_rate(step, total, config, peak) == pytest.approx(
            peak * theirs(step), rel=1e-12
        )


def test_the_rate_rises_to_its_peak_and_falls_to_its_floor():
    config = TrainConfig(warmup_ratio=0.1)
    rates = [learning_rate(step, 100, config, 1.0) for step in range(101)]
    assert rates[0] == 0
    assert rates[:11] == sorted(rates[:11])
    assert rates[10] == max(rates) == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)
