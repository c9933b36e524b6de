"""Grading in the sandbox: cost of a run, references that must pass, references with one line made
wrong that must not.

python benchmarks/sandbox.py [namespaces|landlock] [benchmark ...]
"""

from __future__ import annotations

import ast
import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator

from report import data_folder, show

from asap.grades import Grade
from asap.problems import Problem
from asap_evaluator.grader import Grader
from asap_evaluator.isolation import Program
from asap_evaluator.sandbox import LEVELS, Sandbox
from asap_runtime.benchmarks import load_benchmark

BENCHMARKS = ("humaneval", "humaneval-plus", "leetcode")
RUNS = 100
FLIPS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Lt: ast.GtE,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.GtE: ast.Lt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,  # codespell:ignore notin
    ast.And: ast.Or,
    ast.Or: ast.And,
}


def changes(tree: ast.AST) -> Iterator[tuple[ast.AST, str, object]]:
    """Each place that can be made wrong: node, field, new value."""
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in FLIPS:
            yield node, "op", FLIPS[type(node.op)]()
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in FLIPS:
            yield node, "ops", [FLIPS[type(node.ops[0])](), *node.ops[1:]]
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield node, "value", not node.value
        elif isinstance(node, ast.Constant) and isinstance(node.value, int):
            yield node, "value", node.value + 1
        elif isinstance(node, ast.Return) and node.value is not None:
            yield node, "value", ast.Constant(None)


def with_one_wrong_line(problem: Problem) -> str:
    """The reference with one place changed, always the same one."""
    tree = ast.parse(problem.reference or "")
    name = (problem.entry_point or "").rpartition(".")[2]
    function = next(
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name
    )
    node, field, value = random.Random(problem.task_id).choice(list(changes(function)))
    setattr(node, field, value)
    return ast.unparse(tree)


async def graded(grader: Grader, programs: list[tuple[str, Problem]]) -> tuple[list[Grade], float]:
    began = time.perf_counter()
    grades = await asyncio.gather(*(grader.grade(code, problem) for code, problem in programs))
    return grades, time.perf_counter() - began


def starts(sandbox: Sandbox) -> tuple[float, float]:
    """Seconds of one run of an empty program, alone; runs a second in the whole pool."""
    from concurrent.futures import ThreadPoolExecutor

    def run(_: int) -> None:
        sandbox.run([Program(source="pass")], sandbox.limits)

    began = time.perf_counter()
    for number in range(RUNS):
        run(number)
    alone = (time.perf_counter() - began) / RUNS
    with ThreadPoolExecutor(2) as threads:
        began = time.perf_counter()
        list(threads.map(run, range(2 * RUNS)))
    return alone, 2 * RUNS / (time.perf_counter() - began)


async def measure(sandbox: Sandbox, names: list[str]) -> None:
    alone, rate = starts(sandbox)
    rows = [("one empty program", RUNS, f"{alone * 1e3:.1f} ms", f"{rate:.0f} runs/s", "")]
    notes: list[str] = []
    grader = Grader(sandbox)
    for name in names:
        problems = load_benchmark(name, str(data_folder())).problems
        for kind, change in (("references", None), ("one wrong line", with_one_wrong_line)):
            programs = [(change(p) if change else p.reference or "", p) for p in problems]
            grades, seconds = await graded(grader, programs)
            verdicts = Counter(grade.verdict for grade in grades)
            flips = sum("flipped" in grade.flags for grade in grades)
            each = f"{seconds / len(grades) * 1e3:.0f} ms"
            counts = ", ".join(f"{verdict} {n}" for verdict, n in verdicts.most_common())
            rows.append((f"{name}, {kind}", len(grades), each, f"{seconds:.1f} s", counts))
            odd = [
                f"{p.task_id} ({g.verdict}: {g.detail})" if kind == "references" else p.task_id
                for p, g in zip(problems, grades, strict=True)
                if g.passed is (change is not None)
            ]
            notes.append(f"{name}, {kind}, {flips} flipped, unexpected: {', '.join(odd) or 'none'}")
    grader.close()
    facts = sandbox.facts
    show(
        f"Level {facts['level']}, kernel {facts['kernel']}, speed {facts['speed']}",
        ("what", "n", "each", "together", "verdicts"),
        rows,
    )
    print(*notes, sep="\n")


def main() -> None:
    arguments = sys.argv[1:] or [LEVELS[0]]
    level, names = arguments[0], arguments[1:] or list(BENCHMARKS)
    sandbox = Sandbox.open(least=level, levels=(level,))
    try:
        asyncio.run(measure(sandbox, names))
    finally:
        sandbox.close()


if __name__ == "__main__":
    main()
