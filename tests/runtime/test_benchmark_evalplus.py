from __future__ import annotations

import pytest

from asap_runtime.benchmark_evalplus import differential_test, repair_original, restore_inputs


@pytest.mark.parametrize(
    ("assertion", "stored", "restored"),
    [
        ("f((3, 4), [5])", [[1], [2]], [(1,), [2]]),
        ("f([(1, 2), (3, 4)], 2)", [[[1, 2]], 3], [[(1, 2)], 3]),
        ("f((1, (2, (3,))))", [[1, [2, [3, [4]]]]], [(1, (2, (3, (4,))))]),
        ("f({1, 2}, [{}, {3}])", [[1], [[], [2]]], [{1}, [set(), {2}]]),
        ("f(set([1]))", [[2]], [{2}]),
        ("f({'a': (1, 2)})", [{"b": [3, 4]}], [{"b": (3, 4)}]),
        ("f(1, 2j)", ["0", "1+2j"], [0.0, 1 + 2j]),
        ("f('a', -1)", ["1", "b"], ["1", "b"]),
        ("f(1)", [[1, [2]]], [[1, [2]]]),
        ("f([])", [[[1]], "more"], [[[1]], "more"]),
    ],
)
def test_inputs_get_the_types_of_the_examples(assertion, stored, restored):
    text = f"import math\nassert math.isclose({assertion}, 1)\nassert g([1])"
    assert restore_inputs("f", text, [stored]) == [restored]
    assert repr(restore_inputs("f", text, [stored])) == repr([restored])


def test_examples_that_disagree_are_read_together():
    text = "assert f((1, 2)) == 1\nassert not f([])"
    assert restore_inputs("f", text, [[[3]]]) == [[(3,)]]


def passes(name, reference, inputs, candidate, atol=0):
    space = {}
    exec(differential_test(name, reference, inputs, atol), space)
    try:
        space["check"](candidate)
    except AssertionError:
        return False
    return True


def test_the_candidate_is_compared_on_every_input():
    reference = "def f(x):\n    return x * 2\n"
    assert passes("f", reference, [[1], [2]], lambda x: x + x)
    assert not passes("f", reference, [[1], [2]], lambda x: 2)


def test_neither_side_sees_the_others_changes():
    reference = "def f(x):\n    x.append(1)\n    return len(x)\n"
    assert passes("f", reference, [[[1, 2]]], lambda x: len(x) + 1)


@pytest.mark.parametrize(
    ("atol", "off", "good"),
    [(0, 1e-7, True), (0, 1e-3, False), (0.01, 1e-3, True), (0.01, 0.1, False)],
)
def test_floats_are_close_and_nothing_else_is(atol, off, good):
    reference = (
        "def f(x):\n    return [x / 3, (x, 0.5)]\n" if atol else "def f(x):\n    return x / 3\n"
    )
    value = (lambda x: [x / 3 + off, (x, 0.5)]) if atol else (lambda x: x / 3 + off)
    assert passes("f", reference, [[1.0]], value, atol) is good


def test_inputs_without_end_can_be_written():
    reference = "def f(x):\n    return x\n"
    assert passes("f", reference, [[float("inf")], [-float("inf")]], lambda x: x)


def test_the_rules_of_single_tasks():
    roots = "def poly(xs, x):\n    return xs[0] + xs[1] * x\ndef find_zero(xs):\n    return 0\n"
    assert passes("find_zero", roots, [[[2, 1]]], lambda xs: -2.0, 1e-4)
    assert not passes("find_zero", roots, [[[2, 1]]], lambda xs: -2.1, 1e-4)
    shared = "def similar_elements(a):\n    return (1, 2)\n"
    assert passes("similar_elements", shared, [[0]], lambda a: [2, 1])
    found = "def check_str(s):\n    return object() if s else None\n"
    assert passes("check_str", found, [["a"], [""]], bool)
    assert not passes("check_str", found, [["a"], [""]], lambda s: True)


def test_the_broken_test_is_repaired_and_others_are_left():
    broken = "    assert _poly(*candidate(*inp), inp) <= 0.0001\n"
    whole = "    assert abs(_poly(*inp, candidate(*copy.deepcopy(inp)))) <= 0.0001\n"
    assert repair_original(broken) == "import copy\n" + whole
    assert repair_original("assert candidate(1)") == "assert candidate(1)"


ORIGINAL = """
import numpy as np

def assertion(out, exp, atol):
    if out != exp and atol != 0:
        assert np.allclose(out, exp, rtol=1e-07, atol=atol)
    else:
        assert out == exp

def check(candidate):
    for inp, exp in [([[4.0]], 4.0), ([[1.0, 2.0]], 1.5)]:
        assertion(candidate(*inp), exp, 1e-6)
        assertion(sum(*inp) / len(*inp), exp, 1e-6)
"""


@pytest.mark.parametrize(
    ("program", "good"),
    [
        (lambda x: sum(x) / len(x), True),
        (lambda x: x and sum(x) / len(x) + 1e-8, True),
        (lambda x: [], False),  # broadcast, nothing is close to anything
        (lambda x: [[]], False),
        (lambda x: [sum(x) / len(x)], False),
        (lambda x: (sum(x) / len(x), x.append(9.0))[0], True),  # its own copy
    ],
)
def test_the_original_form_takes_no_empty_result_and_keeps_its_inputs(program, good):
    space: dict[str, object] = {}
    exec(repair_original(ORIGINAL), space)
    try:
        space["check"](program)
    except AssertionError:
        assert not good
    else:
        assert good
