"""Runs in the tests' sandbox: executes `check` with a stand-in for the program's function.

The program runs in another sandbox and sees only the arguments of each call; this one holds the
expected values and the nonce, and executes nothing that the program sent. The verdict leaves as one
line on a descriptor that the program never held.
"""

from __future__ import annotations

import builtins
import json
import os
import sys
import types

from asap_evaluator.inside.codec import Table, Unsendable, write_line

TYPE_CHECKING = False  # typing itself would cost every run 4 ms
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, BinaryIO

    Setup = dict[str, Any]

LONGEST_REPLY = 16 * 2**20


class Ended(BaseException):
    """No verdict by the tests is possible any more; not an Exception, so no test swallows it."""

    def __init__(self, outcome: str, detail: str) -> None:
        super().__init__(detail)
        self.outcome, self.detail = outcome, detail


class CandidateError(Exception):
    """The program raised what is no ordinary exception."""


class Candidate:
    """The program's function, far away."""

    def __init__(self, replies: BinaryIO, calls: BinaryIO, classes: Mapping[str, type]) -> None:
        self.made = 0
        self.error: Exception | None = None
        self.told = ""
        self.ended: Ended | None = None
        self._replies, self._calls, self._classes = replies, calls, classes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it there; its changes to the arguments are made here too."""
        self.made += 1
        table, asked = Table(self._classes), os.urandom(8).hex()
        try:
            sent = {
                "id": asked,
                "args": [table.encode(value) for value in args],
                "kwargs": {name: table.encode(value) for name, value in kwargs.items()},
                "rows": table.rows(),
                "classes": list(self._classes),
            }
        except Unsendable as error:
            raise self.end("unsendable", f"argument of type {error}") from None
        try:
            write_line(self._calls, sent)
        except OSError:
            raise self.end("gone", f"call {self.made}") from None
        return self._value(asked, table)

    def _value(self, asked: str, table: Table) -> Any:
        reply = self.receive()
        if reply.get("id") != asked:
            raise self.end("forged", "a reply that answers no call")
        if "raised" in reply:
            raise self._exception(reply)
        if "unsendable" in reply:
            raise self.end("wrong", f"result of type {str(reply['unsendable'])[:80]}")
        try:
            table.take({int(number): row for number, row in reply["rows"]})
            return table.decode(reply["value"])
        except (LookupError, TypeError, ValueError, RecursionError):
            raise self.end("forged", "a reply that is no value") from None

    def receive(self) -> Setup:
        """The next reply. Raises Ended when there is none."""
        line = self._replies.readline(LONGEST_REPLY + 1)
        if len(line) > LONGEST_REPLY:
            raise self.end("output-limit", "a reply over 16 MiB")
        if not line.endswith(b"\n"):
            raise self.end("gone", f"call {self.made}")
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict):
            raise self.end("forged", "a reply that is no message")
        return reply

    def _exception(self, reply: Setup) -> Exception:
        cls = getattr(builtins, str(reply["raised"]), None)
        if not (isinstance(cls, type) and issubclass(cls, Exception)):
            cls = CandidateError
        if issubclass(cls, StopIteration):  # a `map` over the calls would end as if it were done
            cls = RuntimeError
        try:
            self.error = cls(str(reply.get("message"))[:200])
        except TypeError:  # UnicodeDecodeError and its like want more arguments
            self.error = CandidateError()
        self.told = describe(reply)
        return self.error

    def end(self, outcome: str, detail: str) -> Ended:
        """The exception that ends the run, whatever the tests do with it."""
        self.ended = self.ended or Ended(outcome, detail)
        return self.ended


def describe(reply: Setup) -> str:
    """An exception of the program in words."""
    return f"{str(reply.get('name'))[:80]}: {str(reply.get('message'))[:200]}"


def prepare(setup: Setup) -> tuple[Setup, dict[str, type]]:
    """The tests' namespace, and the classes whose instances may travel."""
    module = types.ModuleType("tests")
    sys.modules["tests"] = module
    space = vars(module)
    exec(compile(setup["helpers"], "helpers.py", "exec"), space)
    own = {name: value for name, value in space.items() if isinstance(value, type)}
    return space, {name: cls for name, cls in own.items() if cls.__module__ == "tests"}


def judge(setup: Setup, candidate: Candidate, space: Setup) -> tuple[str, str]:
    """Run the tests: an outcome and its detail."""
    first = candidate.receive()
    if "raised" in first:
        return ("memory" if first["raised"] == "MemoryError" else "exception"), describe(first)
    if first != {"loaded": True}:
        return "forged", "an answer before any call"
    exec(compile(setup["test"], "test.py", "exec"), space)
    check = space["check"]  # MBPP has a task whose function is called so, too
    # Tests also call the function by its own name; that must not be the reference's.
    if setup["entry_point"].isidentifier():
        space[setup["entry_point"]] = candidate
    try:
        check(candidate)
    except AssertionError as error:
        if error is not candidate.error:
            return "wrong", f"assertion after call {candidate.made}"
        return "exception", candidate.told
    except Exception as error:
        if error is not candidate.error:
            return "wrong", f"{type(error).__name__} in the tests after call {candidate.made}"
        return ("memory" if isinstance(error, MemoryError) else "exception"), candidate.told
    if not candidate.made:
        return "wrong", "the tests called nothing"
    return "passed", f"{candidate.made} calls"


def main(setup_fd: str, report_fd: str, replies_fd: str, calls_fd: str) -> None:
    """Judge, then say so once."""
    with os.fdopen(int(setup_fd), "rb") as stream:
        setup = json.load(stream)
    report = os.fdopen(int(report_fd), "wb")
    replies, calls = os.fdopen(int(replies_fd), "rb"), os.fdopen(int(calls_fd), "wb")
    space, classes = prepare(setup)
    candidate = Candidate(replies, calls, classes)
    try:
        outcome, detail = judge(setup, candidate, space)
    except MemoryError:
        outcome, detail = "memory", "a reply too large"
    except BaseException as error:
        # Whatever a reply set off here, it is not a pass, and it is no trouble of the sandbox.
        outcome, detail = "forged", f"a reply that ended the tests: {type(error).__name__}"
    if candidate.ended:
        outcome, detail = candidate.ended.outcome, candidate.ended.detail
    write_line(report, {"nonce": setup["nonce"], "outcome": outcome, "detail": detail})
    os._exit(0)
