"""Runs in the program's sandbox: loads the program, calls its function, sends the values.

It holds no expected value and no verdict: all that a program can gain by taking it over is to send
other values. Descriptors by number: the setup to read, where answers go, and for `asserts` where
calls come from.
"""

from __future__ import annotations

import json
import os
import sys
import types

from asap_evaluator.inside.codec import Table, Unsendable, plain, write_line

TYPE_CHECKING = False  # typing itself would cost every run 4 ms
if TYPE_CHECKING:
    from typing import Any, BinaryIO

    Setup = dict[str, Any]


def load(setup: Setup) -> tuple[Setup, Any]:
    """The program's namespace and its entry point."""
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    space = vars(module)
    exec(compile(setup["program"], "solution.py", "exec"), space)
    return space, eval(setup["entry_point"], space)


def raised(error: BaseException) -> Setup:
    """What is told of an exception."""
    kind = next(
        (cls.__name__ for cls in type(error).__mro__ if cls.__module__ == "builtins"), "Exception"
    )
    try:
        message = str(error)[:200]
    except BaseException:
        message = ""
    return {"raised": kind, "name": type(error).__name__, "message": message}


def answer(function: Any, space: Setup, call: Setup) -> Setup:
    """The reply to one call: its value and what it changed of its arguments."""
    classes = {name: space.get(name) for name in call["classes"]}
    table = Table({name: cls for name, cls in classes.items() if isinstance(cls, type)})
    rows = dict(enumerate(call["rows"]))
    table.take(rows)
    args = [table.decode(atom) for atom in call["args"]]
    kwargs = {name: table.decode(atom) for name, atom in call["kwargs"].items()}
    value = table.encode(function(*args, **kwargs))
    after = enumerate(table.rows())
    return {"value": value, "rows": [[i, row] for i, row in after if rows.get(i) != row]}


def serve(setup: Setup, replies: BinaryIO, calls: BinaryIO) -> None:
    """Answer calls until there are no more."""
    space, function = load(setup)
    write_line(replies, {"loaded": True})
    for line in calls:
        call = json.loads(line)
        try:
            reply = answer(function, space, call)
        except Unsendable as error:
            reply = {"unsendable": str(error)[:80]}
        except BaseException as error:
            reply = raised(error)
        write_line(replies, {"id": call["id"], **reply})


def call_once(setup: Setup, replies: BinaryIO) -> None:
    """Send the value of one call as plain JSON."""
    _, function = load(setup)
    value = function(*setup["args"])
    try:
        write_line(replies, {"value": plain(value)})
    except Unsendable as error:
        write_line(replies, {"unsendable": str(error)[:80]})


def main(setup_fd: str, replies_fd: str, calls_fd: str | None = None) -> None:
    """Serve or call once; exceptions of the program are told, and end the run."""
    with os.fdopen(int(setup_fd), "rb") as stream:
        setup = json.load(stream)
    replies = os.fdopen(int(replies_fd), "wb")
    try:
        if calls_fd is None:
            call_once(setup, replies)
        else:
            serve(setup, replies, os.fdopen(int(calls_fd), "rb"))
    except BaseException as error:
        write_line(replies, raised(error))
    # Threads of the program must not keep the sandbox alive.
    os._exit(0)
