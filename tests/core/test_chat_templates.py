from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asap.errors import InvalidInput, Misconfigured
from asap.sft import TEMPLATES, SftSample, check_template_string, template_for
from file_encoder import CHATML, FileEncoder
from strategies import any_texts

SAMPLE = SftSample("a", "Add 1 and 2.", "first\n\nsecond", "It is 3.")
TARGET = "<think>\nfirst\n\nsecond\n</think>\nIt is 3."
MARKS = tuple(mark for template in TEMPLATES.values() for mark in template.marks)
texts = st.one_of(st.text(max_size=60), any_texts, st.sampled_from(["", "\n", "\n\nx\n", " x "]))
samples = st.builds(SftSample, st.just("a"), texts, texts, texts)
templates = st.sampled_from(list(TEMPLATES.values()))


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir)


def turns(sample: SftSample) -> list[dict[str, str]]:
    answer = f"<think>\n{sample.cot}\n</think>\n{sample.answer}"
    return [{"role": "user", "content": sample.question}, {"role": "assistant", "content": answer}]


@given(sample=samples, template=templates)
def test_the_training_string_starts_with_the_serving_string(sample, template):
    training = template.render(sample)
    prompt = template.prompt(sample.question)
    assert training.text.startswith(prompt)
    assert prompt.endswith("<think>\n")
    assert training.loss_from == len(prompt)
    assert training.loss_to == len(training.text)
    assert training.text[training.loss_from :] == (
        f"{sample.cot}\n</think>\n{sample.answer}{template.eos}"
    )


@given(sample=samples, template=templates)
def test_the_stored_template_renders_the_same_strings(sample, template, tokenizer):
    both = turns(sample)
    ours = {"chat_template": template.jinja(), "tokenize": False}
    training = tokenizer.apply_chat_template(both, **ours)
    prompt = tokenizer.apply_chat_template(both[:1], add_generation_prompt=True, **ours)
    assert training == template.render(sample).text
    assert prompt == template.prompt(sample.question)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "deepseek-r1",
            f"<｜begin▁of▁sentence｜><｜User｜>Add 1 and 2.<｜Assistant｜>{TARGET}"
            "<｜end▁of▁sentence｜><｜User｜>And 3?<｜Assistant｜><think>\n",
        ),
        (
            "chatml",
            "<|im_start|>user\nAdd 1 and 2.<|im_end|>\n"
            f"<|im_start|>assistant\n{TARGET}<|im_end|>\n"
            "<|im_start|>user\nAnd 3?<|im_end|>\n<|im_start|>assistant\n<think>\n",
        ),
    ],
)
def test_earlier_turns_keep_their_thinking(name, text, tokenizer):
    chat = [*turns(SAMPLE), {"role": "user", "content": "And 3?"}]
    rendered = tokenizer.apply_chat_template(
        chat, chat_template=TEMPLATES[name].jinja(), tokenize=False, add_generation_prompt=True
    )
    assert rendered == text


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=lambda one: one.name)
def test_the_stored_template_refuses_a_system_turn(template, tokenizer):
    from jinja2 import TemplateError

    chat = [{"role": "system", "content": "Be brief."}, *turns(SAMPLE)]
    with pytest.raises(TemplateError, match="user and assistant turns only"):
        tokenizer.apply_chat_template(chat, chat_template=template.jinja(), tokenize=False)


def test_auto_takes_the_template_whose_tokens_are_there(tiny_model_dir, tiny_model_no_bos_dir):
    assert template_for("auto", FileEncoder(tiny_model_dir)).name == "deepseek-r1"
    assert template_for("auto", FileEncoder(tiny_model_no_bos_dir)).name == "deepseek-r1"


class Words:
    """A tokenizer as far as choosing a template goes: a table of control tokens."""

    def __init__(self, *tokens: str, eos: str | None) -> None:
        self.tokens = tokens
        self.bos_id = None
        self.eos_id = None if eos is None else self.token_id(eos)

    def token_id(self, token):
        return self.tokens.index(token) if token in self.tokens else None

    def encode(self, text):
        raise AssertionError("no text is encoded to choose a template")


def test_auto_takes_chatml_without_thinking_tokens():
    assert template_for("auto", Words(*CHATML, eos="<|im_end|>")) is TEMPLATES["chatml"]


def test_auto_names_the_tokens_of_every_template_when_none_fits():
    with pytest.raises(Misconfigured) as caught:
        template_for("auto", Words("<|im_start|>", "</s>", eos="</s>"))
    assert caught.value.problem_code == "unknown-chat-form"
    assert all(mark in caught.value.detail for mark in MARKS)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_named_template_needs_all_its_tokens(name):
    marks = TEMPLATES[name].marks
    for missing in marks:
        known = [mark for mark in marks if mark != missing]
        with pytest.raises(Misconfigured, match="auto") as caught:
            template_for(name, Words(*known, eos=known[0]))
        assert caught.value.problem_code == "unknown-chat-form"
        assert missing in caught.value.detail
        assert not any(mark in caught.value.detail for mark in known)


@pytest.mark.parametrize("name", ["auto", "chatml"])
@pytest.mark.parametrize("eos", ["<|endoftext|>", None])
def test_refuses_a_tokenizer_that_ends_elsewhere(name, eos):
    with pytest.raises(Misconfigured, match=r"<\|im_end\|>") as caught:
        template_for(name, Words(*CHATML, "<|endoftext|>", eos=eos))
    assert caught.value.problem_code == "eos-mismatch"


STOCK = (  # as the template of DeepSeek's distilled models treats an assistant turn
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "<｜User｜>{{ message['content'] }}{% else %}{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "<｜Assistant｜>{{ content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def test_a_stock_template_that_deletes_the_thinking_is_refused(tokenizer):
    rendered = tokenizer.apply_chat_template(turns(SAMPLE), chat_template=STOCK, tokenize=False)
    assert "It is 3." in rendered
    with pytest.raises(InvalidInput, match="'deepseek-r1'") as caught:
        check_template_string(rendered, SAMPLE, TEMPLATES["deepseek-r1"])
    assert caught.value.problem_code == "thinking-deleted"
    assert "second" not in caught.value.detail


@given(sample=samples, template=templates)
def test_our_own_templates_keep_the_thinking(sample, template):
    check_template_string(template.render(sample).text, sample, template)


def test_marks_are_written_as_plain_strings_of_the_stored_template():
    for template in TEMPLATES.values():
        assert all(json.dumps(mark, ensure_ascii=False)[1:-1] in template.jinja()
                   for mark in template.marks)  # fmt: skip
