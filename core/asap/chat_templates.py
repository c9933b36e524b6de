r"""Chat templates: the string that serving sends, and the one to train on that starts with it.

Knows what stands around question and thinking in two families of models; no tokenizer, which comes
as an `Encoder`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal, Protocol

from asap.errors import InvalidInput, Misconfigured
from asap.thinking import OPEN, render_target
from asap.train_config import TemplateName

__all__ = [
    "FORCED_PREFIX",
    "TEMPLATES",
    "ChatTemplate",
    "Encoder",
    "Encoding",
    "SftSample",
    "TrainingText",
    "check_template_string",
    "template_for",
]

FORCED_PREFIX = f"{OPEN}\n"
"""What the serving prompt ends in, so that the model always thinks."""


@dataclass(frozen=True, slots=True)
class SftSample:
    """One triple to train on."""

    id: str
    question: str
    cot: str
    """The pruned one, C'."""
    answer: str


@dataclass(frozen=True, slots=True)
class TrainingText:
    """A training string, and where in it the loss lies when the forced prefix carries none.

    Offsets are code points: `text[:loss_from]` is the serving prompt, `text[loss_from:loss_to]` is
    the rest of the thinking, the answer and EOS.
    """

    text: str
    loss_from: int
    loss_to: int


@dataclass(frozen=True, slots=True)
class Encoding:
    """Ids, and for each its half-open span of code points in the text.

    Spans are in order, never shrink to leave blanks out, and leave no part of the text uncovered;
    several tokens of one character share its span. Control tokens have theirs like any other.
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


class Encoder(Protocol):
    """A tokenizer that adds no special tokens by itself but knows those written in the text."""

    @property
    def bos_id(self) -> int | None:
        """Id of the token that the tokenizer itself calls BOS."""

    @property
    def eos_id(self) -> int | None:
        """Id of the token at which generation ends."""

    def encode(self, text: str) -> Encoding:
        """All of the text, nothing added, nothing cut off."""

    def token_id(self, token: str) -> int | None:
        """Id of a control token such as `<|im_end|>`; None when the text is not one token."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The chat form of one model family: what stands before, between and behind the texts.

    There is no system turn: no method has one, so the trained model has never seen it.
    """

    name: TemplateName
    bos: str
    """Start of every string; empty in families without."""
    user: str
    user_end: str
    assistant: str
    eos: str
    """Ends each assistant turn, and with it the generation."""
    between: str
    """Stands between two turns, never behind the last."""
    marks: tuple[str, ...]
    """What a tokenizer must know as single tokens to be trained with this template."""

    def prompt(self, question: str) -> str:
        r"""What serving sends for one question, up to and including `<think>` and its newline."""
        return (
            f"{self.bos}{self.user}{question}{self.user_end}{self.between}"
            f"{self.assistant}{FORCED_PREFIX}"
        )

    def render(self, sample: SftSample) -> TrainingText:
        r"""The training string. An empty C' gives `<think>\n\n</think>\n` and the answer."""
        prompt = self.prompt(sample.question)
        target = render_target(sample.cot, sample.answer).removeprefix(FORCED_PREFIX)
        text = f"{prompt}{target}{self.eos}"
        return TrainingText(text, len(prompt), len(text))

    def jinja(self) -> str:
        """The same as a chat template for the checkpoint's tokenizer_config.

        A user turn with generation prompt gives `prompt`; with an assistant turn that holds the
        thinking it gives the training string. Every turn keeps its text as it is given: nothing is
        stripped, and no thinking is deleted. A system turn is refused.
        """
        bos, user, user_end, assistant, eos, between, forced = (
            json.dumps(text, ensure_ascii=False)
            for text in (
                self.bos,
                self.user,
                self.user_end,
                self.assistant,
                self.eos,
                self.between,
                FORCED_PREFIX,
            )
        )
        refusal = "This model knows user and assistant turns only."
        return (
            f"{{{{ {bos} }}}}{{% for message in messages %}}"
            f"{{% if not loop.first %}}{{{{ {between} }}}}{{% endif %}}"
            "{% if message['role'] == 'user' %}"
            f"{{{{ {user} + message['content'] + {user_end} }}}}"
            "{% elif message['role'] == 'assistant' %}"
            f"{{{{ {assistant} + message['content'] + {eos} }}}}"
            f"{{% else %}}{{{{ raise_exception('{refusal}') }}}}{{% endif %}}{{% endfor %}}"
            "{% if add_generation_prompt %}"
            f"{{{{ {between} + {assistant} + {forced} }}}}{{% endif %}}"
        )


TEMPLATES: dict[TemplateName, ChatTemplate] = {
    "deepseek-r1": ChatTemplate(
        name="deepseek-r1",
        bos="<｜begin▁of▁sentence｜>",
        user="<｜User｜>",
        user_end="",
        assistant="<｜Assistant｜>",
        eos="<｜end▁of▁sentence｜>",
        between="",
        marks=("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
    ),
    "chatml": ChatTemplate(
        name="chatml",
        bos="",
        user="<|im_start|>user\n",
        user_end="<|im_end|>",
        assistant="<|im_start|>assistant\n",
        eos="<|im_end|>",
        between="\n",
        marks=("<|im_start|>", "<|im_end|>"),
    ),
}


def template_for(name: TemplateName | Literal["auto"], encoder: Encoder) -> ChatTemplate:
    """The template of this name; `auto`: the first one whose marks the tokenizer knows.

    The tags of the thinking need not be single tokens: they are text that the model writes. Raises
    Misconfigured: `unknown-chat-form` when marks are not single tokens, `eos-mismatch` when
    generation would not end where the training string does.
    """
    if name == "auto":
        fitting = [one for one in TEMPLATES.values() if not _unknown_marks(one, encoder)]
        if not fitting:
            known = "; ".join(f"{one.name}: {', '.join(one.marks)}" for one in TEMPLATES.values())
            raise Misconfigured(
                "the base model's tokenizer has the control tokens of no known chat template "
                f"({known}); take a base model of one of these families, or add the tokens to its "
                "tokenizer",
                code="unknown-chat-form",
            )
        template = fitting[0]
    else:
        template = TEMPLATES[name]
        if unknown := _unknown_marks(template, encoder):
            raise Misconfigured(
                f"template {name!r} needs {', '.join(unknown)} as single tokens, and the base "
                "model's tokenizer cuts them up; take template 'auto' or another base model",
                code="unknown-chat-form",
            )
    if encoder.eos_id != encoder.token_id(template.eos):
        raise Misconfigured(
            f"template {template.name!r} ends in {template.eos}, but the base model's tokenizer "
            f"has another EOS (id {encoder.eos_id}), so the trained model would not stop; set "
            f"eos_token of its tokenizer to {template.eos}",
            code="eos-mismatch",
        )
    return template


def _unknown_marks(template: ChatTemplate, encoder: Encoder) -> list[str]:
    return [mark for mark in template.marks if encoder.token_id(mark) is None]


def check_template_string(rendered: str, sample: SftSample, template: ChatTemplate) -> None:
    """Refuse what another chat template, such as a model's own, made of the sample's two turns.

    Many delete the thinking of assistant turns, so that training would be on answers alone. Raises
    InvalidInput `thinking-deleted` unless the assistant's text is in it as it was given.
    """
    if render_target(sample.cot, sample.answer) not in rendered:
        raise InvalidInput(
            f"the chat template deletes or changes the assistant's text of sample {sample.id!r}, "
            f"thinking included; train with template {template.name!r} and store that with the "
            "checkpoint",
            code="thinking-deleted",
            sample=sample.id,
        )
