"""The `code` split: blocks that together form one piece of unfenced code become one step (ours).

Real traces seldom fence their code, so blank lines cut it: a function becomes three steps, and
removing one of them leaves code that cannot run. A block continues the piece before it when

1. the piece is code and the block starts indented (the body goes on behind a blank line);
2. the piece began under a line that ends in a colon, and the block stands deeper than that line
(this
   also keeps pseudo-code whole, "for each stick:" and what it does);
3. the piece is code with an open bracket and the block is code or starts like the inside of one;
4. the piece and the block are both code (statements of one program, a blank line between them).

A block is code when Python parses it as statements that do something, or most of its lines parse
alone; a word like "So" or a label like "Note: text" parses too, and is not code. A fenced block
stands alone.
"""

from __future__ import annotations

import ast
import io
import re
import textwrap
import tokenize
import warnings
from collections.abc import Sequence
from contextlib import suppress

from asap.fences import find_fences

__all__ = ["is_code", "merge_code"]

_OPENER = re.compile(
    r"[ \t]*(async[ \t]+)?"
    r"(def|class|for|while|if|elif|else|try|except|finally|with|match|case)\b.*:[ \t]*(#.*)?"
)
_DEPENDENT = re.compile(r"(elif|else|except|finally|case)\b")
_LIST_ITEM = re.compile(r"[ \t]*([-*+•]|\d+[.)])[ \t]")
_INSIDE_BRACKET = re.compile(r"""[ \t]|[\]})"'\d#]""")
_CLOSER = {"(": ")", "[": "]", "{": "}"}
_DOING = (
    ast.Assign,
    ast.AugAssign,
    ast.Return,
    ast.Import,
    ast.ImportFrom,
    ast.Break,
    ast.Continue,
    ast.Pass,
    ast.Raise,
    ast.Assert,
    ast.Delete,
    ast.Global,
    ast.Nonlocal,
    ast.If,
    ast.For,
    ast.While,
    ast.With,
    ast.Try,
    ast.Match,
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
)


def merge_code(steps: Sequence[str], separator: str) -> list[str]:
    """`steps` with each run of blocks that form one piece of code joined by `separator`."""
    merged: list[str] = []
    piece: list[str] = []
    piece_is_code = False
    for step in steps:
        step_is_code = is_code(step)
        if piece and (
            _under_header(piece, step) or _continues(piece, piece_is_code, step_is_code, step)
        ):
            piece.append(step)
            piece_is_code = piece_is_code or step_is_code
        else:
            if piece:
                merged.append(separator.join(piece))
            piece, piece_is_code = [step], step_is_code
    if piece:
        merged.append(separator.join(piece))
    return merged


def _under_header(piece: Sequence[str], step: str) -> bool:
    """The block stands deeper than a line before it that ends in a colon: its body, in any
    language.
    """
    if _LIST_ITEM.match(step) or _holds_fence(piece[-1]) or _holds_fence(step):
        return False
    header = piece[0] if len(piece) > 1 else piece[0].split("\n")[-1]
    opens = len(piece) > 1 or header.rstrip().endswith(":")
    return opens and _indent(step) > _indent(header)


def _continues(piece: Sequence[str], piece_is_code: bool, step_is_code: bool, step: str) -> bool:
    if not piece_is_code or _holds_fence(piece[-1]) or _holds_fence(step):
        return False
    indented = step[0] in " \t" and not _LIST_ITEM.match(step)
    if indented or step_is_code:
        return True
    return _INSIDE_BRACKET.match(step) is not None and bool(_missing_closers("\n\n".join(piece)))


def _indent(text: str) -> int:
    return len(text) - len(text.lstrip(" \t"))


def is_code(block: str) -> bool:
    """Whether `block` reads as Python statements: as a whole, or most of its lines one by one."""
    if _holds_fence(block):
        return False
    code = textwrap.dedent(block)
    if _parses_as_statements(code):
        return True
    if (closers := _missing_closers(code)) and _parses_as_statements(code + closers):
        return True
    lines = [
        line for line in block.split("\n") if line.strip() and not line.lstrip().startswith("#")
    ]
    if not lines:
        return False
    return 2 * sum(_parses_as_statements(line.strip()) for line in lines) > len(lines)


def _parses_as_statements(code: str) -> bool:
    if _DEPENDENT.match(code):
        keyword = code.split(maxsplit=1)[0].rstrip(":")
        opener = {"except": "try:\n pass\n", "finally": "try:\n pass\n", "case": "match 0:\n "}
        code = opener.get(keyword, "if 0:\n pass\n") + code
    if _OPENER.fullmatch(code.rsplit("\n", 1)[-1]):
        last_indent = re.match(r"[ \t]*", code.rsplit("\n", 1)[-1])
        code += "\n" + (last_indent[0] if last_indent else "") + "  pass"
    try:
        with (
            warnings.catch_warnings()
        ):  # prose may hold "\\d" or "is 5"; the parser's advice is not ours
            warnings.simplefilter("ignore")
            body = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(_does_something(node) for node in body)


def _does_something(node: ast.stmt) -> bool:
    match node:
        case ast.AnnAssign(annotation=ast.Name() | ast.Subscript() | ast.Attribute()):
            return node.value is not None
        case ast.Expr(value=ast.Call() | ast.Await() | ast.Yield()):
            return True
        case _:
            return isinstance(node, _DOING)


def _missing_closers(code: str) -> str:
    """The closing brackets that `code` still wants, strings and comments aside."""
    stack: list[str] = []
    # the tokenizer raises at the end of a text inside an open bracket
    with suppress(tokenize.TokenError, SyntaxError):
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            if token.type == tokenize.OP and token.string in _CLOSER:
                stack.append(_CLOSER[token.string])
            elif token.type == tokenize.OP and stack and token.string == stack[-1]:
                stack.pop()
    return "".join(reversed(stack))


def _holds_fence(step: str) -> bool:
    return ("```" in step or "~~~" in step) and bool(find_fences(step.split("\n")))
