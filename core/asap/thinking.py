"""The only module that knows `<think>`: parse a generation, render a target, refuse control
tokens.
"""

from __future__ import annotations

from asap.errors import InvalidInput

__all__ = ["CONTROL_TOKENS", "check_control_tokens", "parse_generation", "render_target"]

OPEN, CLOSE = "<think>", "</think>"

# Exact strings that a chat tokenizer turns into single control ids. Text that merely looks like one
# ("<|...|>" in a programming problem) is ordinary text and passes.
CONTROL_TOKENS: tuple[str, ...] = (
    OPEN,
    CLOSE,
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)


def parse_generation(text: str, *, implicit_open: bool = False) -> tuple[str, str]:
    """Split `<think>` C `</think>` A into (C, A), both stripped.

    Exactly one tag of each, in order. With `implicit_open` a missing opening tag is accepted, as
    chat templates that end in `<think>` leave it out. Anything else raises `malformed-think`.
    """
    opens, closes = text.count(OPEN), text.count(CLOSE)
    if opens == 0 and implicit_open and closes == 1:
        text, opens = OPEN + text, 1
    before, _, rest = text.partition(OPEN)
    cot, _, answer = rest.partition(CLOSE)
    if opens != 1 or closes != 1 or CLOSE in before or before.strip():
        raise InvalidInput(
            f"expected one {OPEN} … {CLOSE} at the start of the generation, "
            f"found {opens} {OPEN} and {closes} {CLOSE}"
            + (", with text before the first" if before.strip() and opens else "")
            + (" (an unfinished response?)" if closes == 0 else ""),
            code="malformed-think",
        )
    return cot.strip(), answer.strip()


def render_target(cot: str, answer: str) -> str:
    """The assistant text to train on: `<think>`, C', `</think>`, A, each on its own line (§3.4)."""
    return f"{OPEN}\n{cot}\n{CLOSE}\n{answer}"


def check_control_tokens(field: str, text: str) -> None:
    """Raise `control-token-in-text` when `text` holds a chat control token."""
    for token in CONTROL_TOKENS:
        if token in text:
            raise InvalidInput(
                f"field {field!r} contains the control token {token!r} at character "
                f"{text.index(token)}; remove it or parse the field as a generation",
                code="control-token-in-text",
                field=field,
            )
