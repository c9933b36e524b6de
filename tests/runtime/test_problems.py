from __future__ import annotations

import asap.errors
from asap.errors import AsapError
from asap_runtime.problems import PROBLEMS, problem_of


def subclasses(cls):
    return {cls}.union(*(subclasses(child) for child in cls.__subclasses__()))


def test_every_error_class_has_a_row_and_an_exit_code():
    assert set(PROBLEMS) == subclasses(AsapError)
    assert all(64 <= problem.exit_code <= 78 for problem in PROBLEMS.values())


def test_the_drawn_tree_names_every_class():
    for name in asap.errors.__all__:
        assert name in asap.errors.__doc__


def test_an_error_finds_its_row():
    assert problem_of(asap.errors.Misconfigured("x")).exit_code == 78
