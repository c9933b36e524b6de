"""Foreign text on a terminal: a trace may hold escape sequences, and must not steer the screen."""

from __future__ import annotations

__all__ = ["printable"]

# C0 and C1 controls but tab and newline, as the symbols that stand for them
_CONTROLS = {code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)} | {
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}


def printable(text: str) -> str:
    """`text` with every control character shown instead of sent."""
    return text.translate(_CONTROLS)
