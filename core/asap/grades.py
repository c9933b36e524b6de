"""What grading a program came to. Frozen, JSON both ways."""

from __future__ import annotations

import ast
from typing import Literal

from pydantic import Field

from asap.types import Frozen

__all__ = ["Grade", "Verdict", "risky_names"]

Verdict = Literal[
    "passed",
    "wrong",
    "exception",
    "timeout",
    "memory",
    "output-limit",
    "no-code",
    "sandbox-trouble",
]
"""`wrong`: a value or output other than expected, or no proof of a pass. `sandbox-trouble`: the
sandbox failed, three times; that says nothing of the program.
"""

RISKY_MODULES = frozenset({"ctypes", "gc", "inspect"})
RISKY_NAMES = frozenset({"_exit", "_getframe"})


class Grade(Frozen):
    """One program against one problem."""

    verdict: Verdict
    detail: str = ""
    """For a reader: which call, which exception, which limit. May quote the program's message."""
    seconds: float = Field(0.0, ge=0)
    """Wall time of the deciding run, all its cases together."""
    cpu_s: float = Field(0.0, ge=0)
    """CPU time of the program's processes in it, user and system."""
    memory_bytes: int = Field(0, ge=0)
    """Most that was seen resident at once."""
    flags: tuple[str, ...] = ()
    """`uses:NAME` for what graders have been fooled with; `retried` after trouble of the sandbox;
    `repeated` for a time-out that was run once more alone, and `flipped` if that went otherwise.
    """

    @property
    def passed(self) -> bool:
        """Whether the program solves the problem."""
        return self.verdict == "passed"

    @property
    def scored(self) -> bool:
        """Whether the grade says anything of the program."""
        return self.verdict != "sandbox-trouble"


def risky_names(program: str) -> tuple[str, ...]:
    """Which of `os._exit`, `sys._getframe`, `gc`, `inspect`, `ctypes` a program touches, sorted; it
    is no crime. Empty for text that is not Python.
    """
    try:
        tree = ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ()
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names} & RISKY_MODULES
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or "").partition(".")[0]} & RISKY_MODULES
            found |= {alias.name for alias in node.names} & RISKY_NAMES
        elif isinstance(node, ast.Attribute):
            found |= {node.attr} & RISKY_NAMES
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value} & (RISKY_NAMES | RISKY_MODULES)
    return tuple(sorted(found))
