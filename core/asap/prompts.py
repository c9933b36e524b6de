"""The prompts of Appendix E, our numbered-steps prompt, and what is done to a reply before it is
read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Literal

from asap.fences import code_blocks, unwrap, wrap

__all__ = [
    "KEEP_SCHEMA",
    "answer_in_prompt",
    "clean_reply",
    "coarse_prompt",
    "direct_prompt",
    "parse_selection",
    "select_prompt",
]

Wording = Literal["paper", "repo"]

_DIRECT: dict[Wording, str] = {
    "paper": """\
Given a question, please tell me how to get this answer step by step.
Question:
```
{question}
```
Answer:
```python
{answer}
```
Only return a detailed (with code) step-by-step solution (containing only “Step-by-Step Solution” and “Final Code”). The detailed step-by-step solution is:
""",
    "repo": """\
Given a question, please tell me how to get this code step by step.
Question:
```
{question}
```
Code:
```python
{answer}
```
Only return a detailed (with code) step-by-step solution (containing only "Step-by-Step Solution" and "Final Code"). The detailed step-by-step solution is:
""",
}

_COARSE = """\
Compress the given thinking by referring to the provided solution. The goal is to remove irrelevant reasoning paths while retaining all content along the core reasoning path. Compression must be based on thinking, ensuring that the original wording and structure are preserved as much as possible. Follow these strict rules:
1. Use thinking as the foundation: Do not rewrite or replace its content with solution{dash}only use solution to determine which parts are relevant.
2. Remove unnecessary reasoning: Aggressively remove alternative paths that are not part of the core reasoning path.
3. Retain key supporting content: Keep examples, reflections, and tests that help illustrate, verify, or analyze the core reasoning path.
4. Preserve original words: Do not paraphrase, reorder, or change any words.
5. Do not add new words: Do not introduce new concepts, symbols, or abbreviations.
If you understand, compress the following thinking based on the given solution.
Solution:
```
{solution}
```
Thinking:
```
{think}
```
The compressed thinking is:
"""

# Ours: the rules of the paper's prompt, for an answer of a few dozen tokens instead of thousands.
# What never changes comes first, then what is longest and is the trace's own: providers charge less
# for a prompt that begins as an earlier one did, with another anchor or after a restart.
_SELECT = """\
The thinking below is split into numbered steps. Choose the steps to keep by referring to the provided solution. The goal is to remove irrelevant reasoning paths while retaining all content along the core reasoning path. Follow these strict rules:
1. Use solution only to determine which steps of the thinking are relevant.
2. Aggressively drop alternative paths, repetitions and dead ends that are not part of the core reasoning path.
3. Keep examples, reflections, and tests that help illustrate, verify, or analyze the core reasoning path.
4. What is kept must read as one line of reasoning from the first kept step to the last.
Thinking:
```
{think}
```
Solution:
```
{solution}
```
Answer with one JSON object and nothing else: the numbers of the steps to keep, in increasing order, as in {"keep": [1, 2, 5]}.
"""

_PART = """
The thinking above is steps {first} to {last} of {total}; the others are chosen apart. When none of these is needed, the list is empty.
"""

KEEP_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"keep": {"type": "array", "items": {"type": "integer", "minimum": 1}}},
    "required": ["keep"],
    "additionalProperties": False,
}
"""JSON schema of the `select` reply."""

_FENCED_SLOT = re.compile(r"```(\w*)\n\{(\w+)\}\n```")
_KEEP = re.compile(r'"?keep"?\s*[:=]\s*(\[[^\]]*\])')
_LIST = re.compile(r"\[[^\[\]]*\]")
_ITEM = re.compile(r"(\d{1,9})(?:\s*(?:-|–|\.\.|to)\s*(\d{1,9}))?")


def _render(template: str, *, fence_safety: bool, **texts: str) -> str:
    """Fill the fenced slots in one pass, so that inserted text is never read as a slot itself."""

    def fill(slot: re.Match[str]) -> str:
        text, info = texts[slot[2]], slot[1]
        return wrap(text, info) if fence_safety else f"```{info}\n{text}\n```"

    return _FENCED_SLOT.sub(fill, template).rstrip("\n")


def answer_in_prompt(answer: str, which: Literal["last", "first"]) -> str | None:
    """The fenced Python block that stands for the answer; None when there is none."""
    blocks = code_blocks(answer)
    return blocks[-1 if which == "last" else 0] if blocks else None


def direct_prompt(
    question: str,
    answer: str,
    *,
    code: bool = True,
    wording: Wording = "paper",
    fence_safety: bool = True,
) -> str:
    """Ask for the direct CoT, the anchor (§3.2, Appendix E). `code`: whether the answer is
    Python.
    """
    template = _DIRECT[wording]
    if not code:
        template = template.replace("```python", "```")
    return _render(template, fence_safety=fence_safety, question=question, answer=answer)


def coarse_prompt(
    think: str, solution: str, *, wording: Wording = "paper", fence_safety: bool = True
) -> str:
    """Ask for the thinking with its digressions removed (§3.2, Appendix E)."""
    template = _COARSE.replace("{dash}", "—" if wording == "paper" else "——")
    return _render(template, fence_safety=fence_safety, solution=solution, think=think)


def select_prompt(
    steps: Sequence[str],
    solution: str,
    *,
    first: int = 1,
    total: int | None = None,
    fence_safety: bool = True,
) -> str:
    """Ask for the numbers of the steps to keep (protocol `select`).

    The steps are numbered from `first`; they are a part when `total` says that there are more.
    """
    think = "\n\n".join(f"[{number}] {step}" for number, step in enumerate(steps, start=first))
    prompt = _render(_SELECT, fence_safety=fence_safety, solution=solution, think=think)
    if total is None or total == len(steps):
        return prompt
    last = first + len(steps) - 1
    return prompt + _PART.format(first=first, last=last, total=total).rstrip("\n")


def clean_reply(reply: str) -> str:
    """The reply without blank edges and without a fence around the whole of it."""
    return unwrap(reply)


def parse_selection(
    reply: str, last: int, *, first: int = 1, may_be_empty: bool = False
) -> list[int] | None:
    """The step numbers of a `select` reply, sorted, each once; None when it names none or a wrong
    one. An empty list is a choice only when it `may_be_empty`.

    Takes the JSON object that was asked for, also inside a fence or prose; failing that the value
    behind "keep", or the last list. Items are numbers from `first` to `last`, as strings too, or ranges
    such as "3-7".
    """
    numbers: set[int] = set()
    items = _selected_items(clean_reply(reply))
    if not items:
        return [] if may_be_empty and items is not None else None
    for item in items:
        span = _ITEM.fullmatch(item.strip())
        if span is None:
            return None
        low, high = int(span[1]), int(span[2] or span[1])
        if not first <= low <= high <= last:
            return None
        numbers.update(range(low, high + 1))
    return sorted(numbers)


def _selected_items(text: str) -> list[str] | None:
    try:
        value = json.loads(text)
    # Prose around the object, ranges that are no JSON, a number or a nesting without end.
    except (ValueError, RecursionError):
        lists = _KEEP.findall(text) or _LIST.findall(text)
        return lists[-1].strip("[]").replace('"', "").split(",") if lists else None
    if isinstance(value, dict):
        value = value.get("keep")
    return [str(item) for item in value] if isinstance(value, list) else None
