from __future__ import annotations

import pytest
from pydantic import ValidationError

from asap.grades import Grade, risky_names


def test_only_passed_passes_and_trouble_of_ours_scores_nothing():
    assert Grade(verdict="passed").passed
    assert not Grade(verdict="wrong").passed
    assert Grade(verdict="timeout").scored
    assert not Grade(verdict="sandbox-trouble").scored


def test_a_grade_survives_json():
    grade = Grade(verdict="wrong", detail="call 2", seconds=1.5, cpu_s=1.0, flags=("uses:gc",))
    assert Grade.model_validate_json(grade.model_dump_json()) == grade


def test_an_unknown_verdict_is_refused():
    with pytest.raises(ValidationError):
        Grade.model_validate({"verdict": "fine"})


@pytest.mark.parametrize(
    ("program", "names"),
    [
        ("import os\nos._exit(0)", ("_exit",)),
        ("from os import _exit as leave", ("_exit",)),
        ("import sys\nsys._getframe(1)", ("_getframe",)),
        ("import gc, inspect", ("gc", "inspect")),
        ("from ctypes.util import find_library", ("ctypes",)),
        ("__import__('ctypes')", ("ctypes",)),
        ("getattr(os, '_exit')", ("_exit",)),
        ("# os._exit\ndef gcd(a, b): return a", ()),
        ("def broken(", ()),
        ("x = '\0'", ()),
    ],
)
def test_what_graders_are_fooled_with_is_named(program, names):
    assert risky_names(program) == names
