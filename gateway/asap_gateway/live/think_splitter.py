"""Thinking and answer of a text that comes in pieces, cut anywhere, tags included."""

from __future__ import annotations

from enum import Enum, auto

from asap.thinking import CLOSE, OPEN

__all__ = ["ThinkSplitter", "split_thinking"]


class _Part(Enum):
    START = auto()
    LEAD = auto()  # blanks behind the opening tag
    THINKING = auto()
    GAP = auto()  # blanks behind the closing tag
    ANSWER = auto()


class ThinkSplitter:
    """Feed pieces, get (thinking, answer) of each; how the text was cut changes nothing.

    Tags and the blanks around them belong to neither part. Only the first `</think>` counts, and
    only an opening tag that begins the text.

    Args:
        opened: the prompt ended in the opening tag, so the text begins within the thinking; one
            that begins with the tag all the same is taken as well.
    """

    def __init__(self, *, opened: bool) -> None:
        self._opened = opened
        self._held = ""
        self._part = _Part.START
        self.closed = False
        """Whether a thinking has ended."""

    @property
    def thinks(self) -> bool:
        """Whether what comes next may still be thinking."""
        return self._part in (_Part.LEAD, _Part.THINKING) or (
            self._part is _Part.START and self._opened
        )

    def feed(self, piece: str) -> tuple[str, str]:
        """What this piece makes certain."""
        if (
            self._part is _Part.ANSWER and not self._held
        ):  # most pieces by far are in one of two parts
            return "", piece
        self._held += piece
        if self._part is _Part.START and not self._begin(ended=False):
            return "", ""
        thinking = self._take_thinking() if self._part in (_Part.LEAD, _Part.THINKING) else ""
        return thinking, self._take_answer()

    def finish(self) -> tuple[str, str]:
        """What was held back, once the text is over."""
        if self._part is _Part.START:
            self._begin(ended=True)
        thinking, answer = self.feed("")
        held, self._held = self._held, ""
        return (thinking + held, answer) if self._part is _Part.THINKING else (thinking, answer)

    def _begin(self, *, ended: bool) -> bool:
        """Decide what the text begins with; False while that is open."""
        text = self._held.lstrip()
        if text.startswith(OPEN):
            self._held, self._part = text[len(OPEN) :], _Part.LEAD
        elif OPEN.startswith(text) and not ended:
            return False
        else:
            self._part = _Part.THINKING if self._opened else _Part.ANSWER
        return True

    def _take_thinking(self) -> str:
        if self._part is _Part.LEAD:
            self._held = self._held.lstrip()
            if not self._held:
                return ""
            self._part = _Part.THINKING
        before, tag, rest = self._held.partition(CLOSE)
        if tag:
            self._held, self._part, self.closed = rest, _Part.GAP, True
            return before.rstrip()
        certain = before[: len(before) - _overlap(before)].rstrip()
        self._held = before[len(certain) :]
        return certain

    def _take_answer(self) -> str:
        if self._part is _Part.GAP:
            self._held = self._held.lstrip()
            if self._held:
                self._part = _Part.ANSWER
        if self._part is not _Part.ANSWER:
            return ""
        answer, self._held = self._held, ""
        return answer


def split_thinking(text: str, *, opened: bool) -> tuple[str, str]:
    """(thinking, answer) of a whole text."""
    splitter = ThinkSplitter(opened=opened)
    first, last = splitter.feed(text), splitter.finish()
    return first[0] + last[0], first[1] + last[1]


def _overlap(text: str) -> int:
    """Characters at the end that may be the beginning of a closing tag."""
    most = min(len(text), len(CLOSE) - 1)
    return next((size for size in range(most, 0, -1) if text.endswith(CLOSE[:size])), 0)
