from __future__ import annotations

import json
import math
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asap_evaluator.inside.codec import Table, Unsendable, plain


class Node:
    def __init__(self, val=0, next=None):
        self.val, self.next = val, next


def sent(value, classes=None):
    """A value as it arrives on the other side, through JSON text."""
    there, here = Table(classes or {}), Table(classes or {})
    atom = there.encode(value)
    text = json.dumps([atom, there.rows()])
    atom, rows = json.loads(text)
    here.take(dict(enumerate(rows)))
    return here.decode(atom)


leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters())
    | st.binary()
    | st.complex_numbers(allow_nan=False)
    | st.decimals(allow_nan=False)
    | st.fractions()
)
hashable = leaves | st.tuples(leaves, leaves) | st.frozensets(leaves, max_size=3)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(hashable, inner, max_size=3)
        | st.sets(hashable, max_size=3)
        | st.lists(inner, max_size=4).map(deque)
    ),
    max_leaves=10,
)


@given(values)
def test_values_arrive_as_they_were(value):
    arrived = sent(value)
    assert arrived == value
    assert type(arrived) is type(value)


def test_not_a_number_and_endless_digits_arrive():
    assert math.isnan(sent(float("nan")))
    assert sent([10**5000, -(2**63), 1.5]) == [10**5000, -(2**63), 1.5]


def test_shared_and_circular_structure_arrives():
    inner = [1]
    value = [inner, inner]
    value.append(value)
    arrived = sent(value)
    assert arrived[0] is arrived[1]
    assert arrived[2] is arrived


def test_a_long_chain_of_objects_arrives_without_recursion():
    head = None
    for number in range(50_000):
        head = Node(number, head)
    arrived = sent(head, {"Node": Node})
    assert isinstance(arrived, Node)
    assert arrived.val == 49_999
    assert arrived.next.val == 49_998


def test_iterators_arrive_as_iterators():
    arrived = sent(n * n for n in range(3))
    assert next(arrived) == 0
    assert list(arrived) == [1, 4]


@pytest.mark.parametrize("value", [object(), len, Node(), type, lambda: 0])
def test_nothing_else_travels(value):
    with pytest.raises(Unsendable):
        sent(value)


def test_a_subclass_arrives_as_the_plain_value():
    class Liar(int):
        def __eq__(self, other):
            return True

        __hash__ = int.__hash__

    assert type(sent(Liar(4))) is int


def test_changes_to_arguments_come_back_in_place():
    ours = Table({"Node": Node})
    numbers, node = [3, 1, 2], Node(1)
    atoms = [ours.encode(numbers), ours.encode(node)]
    theirs = Table({"Node": Node})
    theirs.take(dict(enumerate(ours.rows())))
    there, there_node = (theirs.decode(atom) for atom in atoms)
    there.sort()
    there.append(there_node)
    there_node.val = 9
    ours.take(dict(enumerate(json.loads(json.dumps(theirs.rows())))))
    assert numbers == [1, 2, 3, node]
    assert node.val == 9


@pytest.mark.parametrize(
    "rows",
    [
        {5: ["l", []]},
        {0: ["x", []]},
        {0: ["o", [], "Popen"]},
        {0: ["o", ["__class__", 1], "Node"]},
        {0: ["o", [1, 1], "Node"]},
        {0: ["d", [1]]},
        {0: ["l", [["r", 7]]]},
        {0: ["l", [{"a": 1}]]},
        {0: ["s", [["r", 0]]]},
        {0: ["l", [["n", "zz"]]]},
        {0: ["l", [["D", ["x"]]]]},
        {0: ["l", [["F", [1, 0]]]]},
    ],
)
def test_rows_that_make_no_sense_are_refused(rows):
    with pytest.raises((ValueError, LookupError, TypeError)):
        Table({"Node": Node}).take(rows)


def test_a_known_value_cannot_change_its_kind():
    table = Table({})
    table.encode([1])
    with pytest.raises(ValueError, match="kind"):
        table.take({0: ["d", []]})


def test_plain_knows_what_json_knows():
    assert plain({"a": (1, [2.5, None])}) == {"a": [1, [2.5, None]]}
    deep: list = []
    for _ in range(200):
        deep = [deep]
    for value in ({1: 2}, {1}, deep, object()):
        with pytest.raises(Unsendable):
            plain(value)
