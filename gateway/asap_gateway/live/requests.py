"""What a caller of `/v1` asks for: allowed fields only, and our own options taken out.

Knows the fields of OpenAI's two completion endpoints and vLLM's sampling extras; no upstream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from asap.errors import InvalidInput

__all__ = ["FIELDS", "Asked", "Kind", "Thinking", "read_request"]

Kind = Literal["chat/completions", "completions"]

_SAMPLING = frozenset({
    "model", "stream", "stream_options", "n", "max_tokens", "temperature", "top_p", "top_k",
    "min_p", "stop", "seed", "user", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "logit_bias", "logprobs", "min_tokens", "ignore_eos", "stop_token_ids",
    "include_stop_str_in_output", "bad_words", "allowed_token_ids", "skip_special_tokens",
    "spaces_between_special_tokens", "truncate_prompt_tokens", "repetition_detection",
    "response_format", "structured_outputs", "add_special_tokens", "return_token_ids",
})  # fmt: skip
_CHAT = frozenset({
    "messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice",
    "parallel_tool_calls", "reasoning_effort", "include_reasoning", "chat_template_kwargs",
    "add_generation_prompt", "continue_final_message",
})  # fmt: skip
FIELDS: Final[dict[Kind, frozenset[str]]] = {
    "chat/completions": _SAMPLING | _CHAT,
    "completions": _SAMPLING | {"prompt", "echo"},
}
"""Left out on purpose: what makes the server fetch something, run the caller's template, or give
one request precedence over others."""
_ALIASES: Final = ("thinking_token_budget", "thinking_budget")
_NOT_GOVERNED: Final = (
    "tools", "logprobs", "top_logprobs", "response_format", "structured_outputs", "echo",
    "return_token_ids", "truncate_prompt_tokens", "continue_final_message",
)  # fmt: skip
"""What a generation that is stopped and continued cannot keep."""


class Thinking(BaseModel):
    """How the thinking is to be shown and bounded; our extension of a request."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["inline", "separate"] = "inline"
    """Inline: as the model writes it. Separate: thinking in `reasoning_content`, and the answer
    alone in `content`, both without tags."""
    budget_tokens: int | None = Field(None, ge=1, le=2**20)
    """Most tokens of thinking; then it is closed, and the answer begins."""
    loop_guard: bool = False
    """Close the thinking, too, when it repeats one text over and over."""

    @property
    def governed(self) -> bool:
        """Whether the thinking may have to be closed."""
        return self.budget_tokens is not None or self.loop_guard


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it is understood. `body` holds what the model server may see of it."""

    kind: Kind
    model: str
    body: Mapping[str, Any]
    stream: bool
    wants_usage: bool
    thinking: Thinking

    @property
    def path(self) -> str:
        """At the model server."""
        return f"/v1/{self.kind}"

    @property
    def max_tokens(self) -> int | None:
        """Most tokens of the completion, as asked."""
        asked = self.body.get("max_completion_tokens")
        return asked if asked is not None else self.body.get("max_tokens")


def read_request(kind: Kind, value: object) -> Asked:
    """Check the parsed body. Raises InvalidInput that names the field."""
    if not isinstance(value, dict):
        raise InvalidInput("the body must be a JSON object")
    body = dict(value)
    thinking = _thinking(body)
    for name in body:
        if name not in FIELDS[kind]:
            raise _refusal("unknown-field", name, f"unknown field {name[:80]!r}")
    model = body.get("model")
    if not isinstance(model, str) or not 1 <= len(model) <= 200:
        raise _refusal("invalid-input", "model", "`model` must name a model")
    _check_whole_number(body, "n", 1, 128)
    _check_whole_number(body, "max_tokens", 1, 2**31 - 1)
    _check_whole_number(body, "max_completion_tokens", 1, 2**31 - 1)
    _check_prompt(kind, body)
    asked = Asked(kind, model, body, _flag(body, "stream"), _wants_usage(body), thinking)
    _check_thinking(asked)
    return asked


def _thinking(body: dict[str, Any]) -> Thinking:
    """Our options, taken out of the body."""
    given = body.pop("thinking", None)
    options = given if given is not None else {}
    if not isinstance(options, dict):
        raise _refusal("invalid-input", "thinking", "`thinking` must be an object")
    for alias in _ALIASES:
        budget = body.pop(alias, None)
        if budget is not None:
            options = {"budget_tokens": budget, **options}
    try:
        return Thinking.model_validate(options, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(("thinking", *map(str, first["loc"])))
        raise _refusal("invalid-input", name, f"`{name[:80]}`: {first['msg']}") from None


def _check_thinking(asked: Asked) -> None:
    if asked.thinking.format == "separate" and asked.kind == "completions":
        raise _refusal("invalid-input", "thinking.format", "only chat keeps thinking apart")
    if not asked.thinking.governed:
        return
    for name in _NOT_GOVERNED:
        if asked.body.get(name) not in (None, False, 0, [], {"type": "text"}):
            raise _refusal(
                "invalid-input", name, f"a thinking budget or loop guard goes without `{name}`"
            )
    if asked.body.get("n") not in (None, 1):
        raise _refusal("invalid-input", "n", "a thinking budget or loop guard takes one choice")
    if asked.kind == "completions" and not isinstance(asked.body["prompt"], str):
        raise _refusal(
            "invalid-input", "prompt", "a thinking budget or loop guard takes one prompt of text"
        )


def _check_prompt(kind: Kind, body: Mapping[str, Any]) -> None:
    if kind == "completions":
        if not isinstance(body.get("prompt"), str | list) or not body["prompt"]:
            raise _refusal("invalid-input", "prompt", "`prompt` must be text or token ids")
        return
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _refusal("invalid-input", "messages", "`messages` must be a list of messages")
    for at, message in enumerate(messages):
        if not isinstance(message, dict):
            raise _refusal("invalid-input", f"messages[{at}]", "a message must be an object")
        parts = message.get("content")
        if isinstance(parts, list) and not all(
            isinstance(part, dict) and part.get("type") == "text" for part in parts
        ):
            raise _refusal(
                "invalid-input",
                f"messages[{at}].content",
                "a message has text alone; no picture and no file is fetched",
            )


def _check_whole_number(body: Mapping[str, Any], name: str, least: int, most: int) -> None:
    value = body.get(name)
    if value is not None and not (type(value) is int and least <= value <= most):
        raise _refusal("invalid-input", name, f"`{name}` must be a whole number from {least} on")


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value not in (None, True, False):
        raise _refusal("invalid-input", name, f"`{name}` must be true or false")
    return bool(value)


def _wants_usage(body: Mapping[str, Any]) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    known = ("include_usage", "continuous_usage_stats", "include_obfuscation")
    if not isinstance(options, dict) or not set(options) <= set(known):
        raise _refusal(
            "invalid-input", "stream_options", f"`stream_options` may hold {', '.join(known)}"
        )
    return bool(options.get("include_usage"))


def _refusal(code: str, field: str, detail: str) -> InvalidInput:
    return InvalidInput(detail, code=code, field=field[:80])
