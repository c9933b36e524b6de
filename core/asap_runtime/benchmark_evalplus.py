"""EvalPlus' native records: inputs without expected values, which come from running the reference.
The test that is made here holds both, as EvalPlus' own HumanEval form holds the values.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["differential_test", "repair_original", "restore_inputs"]

# Kinds of value, the stronger reading first when a task's examples disagree.
_KINDS = ("set", "tuple", "list", "dict", "text", "number", "other")

SET_RESULTS = frozenset(
    {
        "similar_elements",
        "find_char_long",
        "common_in_nested_lists",
        "extract_singly",
        "larg_nnum",
        "intersection_array",
        "find_dissimilar",
        "Diff",
    }
)
"""MBPP+ functions whose results are compared as sets."""
TRUTH_RESULTS = frozenset({"check_str", "text_match_three", "text_starta_endb"})
"""MBPP+ functions that must only tell something from None."""

_TEST = """
def check(candidate):
    import copy

    inf, nan = float("inf"), float("nan")
    atol = {atol!r}
    space = {{}}
    exec({reference!r}, space)

    def close(value, expected, atol):
        if isinstance(expected, (list, tuple)):
            return (
                isinstance(value, (list, tuple))
                and len(value) == len(expected)
                and all(close(v, e, atol) for v, e in zip(value, expected))
            )
        return value == expected or abs(value - expected) <= atol + 1e-7 * abs(expected)

    def floats(value):
        if isinstance(value, (list, tuple)):
            return all(isinstance(item, float) for item in value)
        return isinstance(value, float)

    def same(args, value, expected):
{rule}
        least = 1e-6 if atol == 0 and floats(expected) else atol
        return value == expected or (least != 0 and close(value, expected, least))

    for args in {inputs}:
        expected = space[{entry_point!r}](*copy.deepcopy(args))
        assert same(args, candidate(*copy.deepcopy(args)), expected)
"""

_REPAIRS = (
    (
        "assert _poly(*candidate(*inp), inp) <= 0.0001",
        "assert abs(_poly(*inp, candidate(*inp))) <= 0.0001",
    ),
    (
        "assert np.allclose(out, exp,",
        "assert np.shape(out) == np.shape(exp) and np.allclose(out, exp,",
    ),
    ("candidate(*inp)", "candidate(*copy.deepcopy(inp))"),
)


def differential_test(
    entry_point: str, reference: str, inputs: Sequence[Sequence[Any]], atol: float
) -> str:
    """Code of a `check(candidate)` that compares with the reference on each of the inputs."""
    rule = ""
    if entry_point == "find_zero":
        rule = '        return abs(space["poly"](*args, value)) <= atol'
    elif entry_point in SET_RESULTS:
        rule = "        return set(value) == set(expected)"
    elif entry_point in TRUTH_RESULTS:
        rule = "        return value == expected or bool(value) == (expected is not None)"
    return _TEST.format(
        atol=atol,
        reference=reference,
        rule=rule,
        inputs=repr([tuple(args) for args in inputs]),
        entry_point=entry_point,
    )


def repair_original(test: str) -> str:
    """A test of HumanEval+ in HumanEval form without its defects; other tests come back as they
    are.

    That of `find_zero` unpacks the candidate's root instead of the arguments, so that even its
    reference fails. An empty list is broadcast and then close to any number. A candidate that
    changes its arguments changes what its result is checked with.
    """
    repaired = test
    for broken, whole in _REPAIRS:
        repaired = repaired.replace(broken, whole)
    return test if repaired == test else "import copy\n" + repaired


@dataclass(frozen=True, slots=True)
class _Shape:
    kind: str
    items: _Shape | None = None
    """Of all elements or values."""


def restore_inputs(
    entry_point: str, assertion: str, inputs: Iterable[Sequence[Any]]
) -> list[list[Any]]:
    """MBPP+ inputs with the tuples, sets and complex numbers that JSON turned into lists and text,
    as the calls in the task's own assertions show them.
    """
    calls = [
        [_shape(argument) for argument in node.args]
        for node in ast.walk(ast.parse(assertion))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == entry_point
    ]
    width = max(map(len, calls), default=0)
    shapes = [_merge(call[i] for call in calls if i < len(call)) for i in range(width)]
    return [
        [_argument(shapes[i] if i < width else None, value) for i, value in enumerate(args)]
        for args in inputs
    ]


def _argument(shape: _Shape | None, value: Any) -> Any:
    if shape is not None and shape.kind == "number" and isinstance(value, str):
        with contextlib.suppress(ValueError):
            return complex(value) if "j" in value else float(value)
    return _restore(shape, value)


def _shape(node: ast.AST) -> _Shape:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
        inner = _shape(node.args[0])
        return _Shape(node.func.id if node.func.id in _KINDS else "other", inner.items)
    for kind, cls in (("set", ast.Set), ("tuple", ast.Tuple), ("list", ast.List)):
        if isinstance(node, cls):
            return _Shape(kind, _merge(map(_shape, node.elts)))
    if isinstance(node, ast.Dict):
        return _Shape("dict", _merge(map(_shape, node.values)))
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return _Shape("other")
    if isinstance(value, str):
        return _Shape("text")
    return _Shape("number" if isinstance(value, int | float | complex) else "other")


def _merge(shapes: Iterable[_Shape]) -> _Shape | None:
    found = list(shapes)
    if not found:
        return None
    kind = min((shape.kind for shape in found), key=_KINDS.index)
    return _Shape(kind, _merge(shape.items for shape in found if shape.items))


def _restore(shape: _Shape | None, value: Any) -> Any:
    if shape is None:
        return value
    if isinstance(value, list):
        items = [_restore(_inner(shape), item) for item in value]
        if shape.kind == "set":
            return set(items)
        return tuple(items) if shape.kind == "tuple" else items
    if isinstance(value, Mapping):
        return {key: _restore(shape.items, item) for key, item in value.items()}
    return value


def _inner(shape: _Shape) -> _Shape | None:
    """Of the elements. Where the examples nest tuples in tuples, inputs do so to any depth."""
    nested = shape.kind == "tuple" and shape.items is not None and shape.items.kind == "tuple"
    return shape if nested else shape.items
