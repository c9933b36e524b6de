from __future__ import annotations

import ast
import json

from asap_evaluator.harness import call_setup, judge_setup, program_setup, script
from evaluator_problems import CALL, RIGHT, asserts_problem


def test_scripts_are_whole_programs_of_the_standard_library():
    for role in ("candidate", "judge"):
        tree = ast.parse(script(role))
        modules = {
            (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
        }
        assert not any(module.startswith("asap") for module in modules)
        assert "main(*sys.argv[1:])" in script(role)


def test_the_program_is_told_neither_tests_nor_expected_values_nor_the_reference():
    problem = asserts_problem(reference="SECRET = 1\n" + RIGHT)
    told = program_setup(problem, "def add(a, b): return 0").decode()
    assert "MARKER-EXPECTED" not in told
    assert "SECRET" not in told
    assert json.loads(call_setup(CALL, RIGHT, 1)) == {
        "program": RIGHT,
        "entry_point": "add",
        "args": [[1], [2]],
    }


def test_the_judge_is_told_all_but_the_program():
    told = json.loads(judge_setup(asserts_problem(prelude="import math"), "abc"))
    assert told["nonce"] == "abc"
    assert "MARKER-EXPECTED" in told["test"]
    assert told["helpers"].startswith("import math")
    assert "def add" in told["helpers"]
