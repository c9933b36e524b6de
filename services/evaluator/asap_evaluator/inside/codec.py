"""Values as JSON rows between two programs of which neither may trust the other.

Only plain values travel: None, bool, int, float, complex, Decimal, Fraction, str, bytes, list,
tuple, dict, set, frozenset, deque, range, drained iterators, and instances of named classes as
their attributes.
Nothing here looks up a class, a function or a module by a received name, apart from the classes the
receiver lists itself; there is no pickle. Mutable values are rows of a table and are referred to by
number, so shared and circular structure, and a callee's changes to its arguments, arrive as such.
"""

from __future__ import annotations

import collections
import importlib
import itertools
import json
import sys

TYPE_CHECKING = False  # typing itself would cost every run 4 ms
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any, BinaryIO

    Atom = Any  # None, bool, int, float, str, or [kind, content]
    Row = list[Any]  # [kind, atoms], for objects ["o", atoms, class]; key and value alternate

MOST_DRAWN = 1_000_000
"""Items taken from an iterator before it counts as endless."""
LARGEST_PLAIN = 2**63
"""From here integers travel as hexadecimal digits: decimal ones are refused from 4,300 on."""


LEAVES = frozenset({bool, float, str, type(None)})
"""Types that are their own atoms."""


NUMBERS = {"D": ("decimal", "Decimal"), "F": ("fractions", "Fraction")}
"""By kind of atom, module and class; imported where they are needed, which is rarely."""


class Unsendable(TypeError):
    """A value that cannot travel; says its type."""


class Table:
    """The mutable values of one exchange, by number.

    `classes` are those whose instances may travel: name → class.
    """

    def __init__(self, classes: Mapping[str, type]) -> None:
        self.classes = classes
        self.values: list[Any] = []
        self._numbers: dict[int, int] = {}

    def encode_all(self, items: Any) -> list[Atom]:
        """The atoms for many values."""
        values: list[Any] = list(items)
        types = set(map(type, values))
        if types <= LEAVES:
            return values
        if types - LEAVES == {int}:
            numbers = [value for value in values if type(value) is int]
            if _is_short(min(numbers)) and _is_short(max(numbers)):
                return values
        return [self.encode(value) for value in values]

    def encode(self, value: Any) -> Atom:
        """The atom for a value; mutable ones get a number, and their row is made by `rows`."""
        if value is None or value is True or value is False:
            return value
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, int):
            value = int.__int__(value)
            return value if _is_short(value) else ["n", hex(value)]
        if isinstance(value, float):
            return float.__float__(value)
        if isinstance(value, (tuple, frozenset)):
            kind = "t" if isinstance(value, tuple) else "f"
            return [kind, self.encode_all(value)]
        if isinstance(value, (list, dict, set, collections.deque)) or self._named(value):
            return ["r", self._number(value)]
        return self._encode_rare(value)

    def _encode_rare(self, value: Any) -> Atom:
        if isinstance(value, range):
            return ["R", self.encode_all((value.start, value.stop, value.step))]
        if isinstance(value, (bytes, bytearray)):
            return ["y", bytes(value).hex()]
        if isinstance(value, complex):
            return ["c", [value.real, value.imag]]
        if _is_a("D", value):
            return ["D", [str(value)]]
        if _is_a("F", value):
            return ["F", self.encode_all((value.numerator, value.denominator))]
        if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
            return self.encode(value.item())
        if hasattr(value, "__next__"):
            drawn = list(itertools.islice(value, MOST_DRAWN + 1))
            if len(drawn) <= MOST_DRAWN:
                return ["i", self.encode_all(drawn)]
        raise Unsendable(type(value).__name__)

    def _named(self, value: Any) -> bool:
        return type(value).__name__ in self.classes and hasattr(value, "__dict__")

    def _number(self, value: Any) -> int:
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self.values)
            self.values.append(value)
        return number

    def rows(self) -> list[Row]:
        """The rows of all values so far, and of those that they hold."""
        made: list[Row] = []
        while len(made) < len(self.values):  # a row may add values
            made.append(self._row(self.values[len(made)]))
        return made

    def _row(self, value: Any) -> Row:
        if isinstance(value, dict):
            return ["d", self.encode_all(part for pair in value.items() for part in pair)]
        for kind, cls in (("l", list), ("s", set), ("q", collections.deque)):
            if isinstance(value, cls):
                return [kind, self.encode_all(value)]
        attributes = self.encode_all(part for pair in vars(value).items() for part in pair)
        return ["o", attributes, type(value).__name__]

    def take(self, rows: Mapping[int, Row]) -> None:
        """Build the values of another table's rows. Rows of numbers that are known already change
        those values in place. Rows: number → row. Raises ValueError for rows that make no sense.
        """
        for number in sorted(rows):
            if number == len(self.values):
                self._number(self._empty(rows[number]))
            elif not 0 <= number < len(self.values):
                raise ValueError("a row out of order")
        filled = [(self.values[number], row) for number, row in rows.items()]
        # All decoded before the first is changed: sets and keys hash what they hold.
        for value, items in [(value, self._items(value, row)) for value, row in filled]:
            self._fill(value, items)

    def _empty(self, row: Row) -> Any:
        if row[0] == "o":
            return object.__new__(self.classes[row[2]])
        kinds: dict[str, type] = {"l": list, "d": dict, "s": set, "q": collections.deque}
        return kinds[row[0]]()

    def _items(self, value: Any, row: Row) -> list[Any]:
        if self._row_kind(value) != row[0]:
            raise ValueError("a value changed its kind")
        return self.decode_all(row[1])

    def _row_kind(self, value: Any) -> str:
        for kind, cls in (("d", dict), ("l", list), ("s", set), ("q", collections.deque)):
            if isinstance(value, cls):
                return kind
        return "o"

    def _fill(self, value: Any, items: Any) -> None:
        if isinstance(value, list):
            value[:] = items
        elif isinstance(value, (dict, set, collections.deque)):
            value.clear()
            if isinstance(value, dict):
                items = pairs(items)
            getattr(value, "extend" if isinstance(value, collections.deque) else "update")(items)
        else:
            attributes = dict(pairs(items))
            if not all(isinstance(name, str) and name[:2] != "__" for name in attributes):
                raise ValueError("an attribute without a proper name")
            vars(value).clear()
            vars(value).update(attributes)

    def decode_all(self, atoms: list[Atom]) -> list[Any]:
        """The values of many atoms."""
        if {list, dict}.isdisjoint(map(type, atoms)):
            return atoms
        return [self.decode(atom) for atom in atoms]

    def decode(self, atom: Atom) -> Any:
        """The value of an atom whose rows were taken."""
        if not isinstance(atom, list):
            if isinstance(atom, dict):
                raise ValueError("an object where a value was expected")
            return atom
        kind, content = atom
        if kind == "r":
            return self.values[content]
        if kind == "n":
            return int(content, 16)
        if kind == "y":
            return bytes.fromhex(content)
        items = self.decode_all(content)
        if kind == "t":
            return tuple(items)
        if kind == "f":
            return frozenset(items)
        if kind in NUMBERS:
            return _number_of(kind, items)
        return iter(items) if kind == "i" else {"R": range, "c": complex}[kind](*items)


def _is_a(kind: str, value: Any) -> bool:
    """Whether it is of that class. Nobody has a value of a module that is not imported."""
    module, name = NUMBERS[kind]
    return module in sys.modules and isinstance(value, getattr(sys.modules[module], name))


def _number_of(kind: str, items: list[Any]) -> Any:
    module, name = NUMBERS[kind]
    try:
        return getattr(importlib.import_module(module), name)(*items)
    except ArithmeticError:
        raise ValueError("no such number") from None


def _is_short(value: int) -> bool:
    return -LARGEST_PLAIN < value < LARGEST_PLAIN


def pairs(items: list[Any]) -> Iterator[tuple[Any, Any]]:
    """Two by two."""
    return zip(items[::2], items[1::2], strict=True)


def plain(value: Any, depth: int = 0) -> Any:
    """A value as JSON knows it, with tuples as lists. Raises Unsendable for all else."""
    if depth > 100:
        raise Unsendable("nested too deeply")
    if value is None or isinstance(value, (bool, str, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain(item, depth + 1) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: plain(item, depth + 1) for key, item in value.items()}
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return value.item()
    raise Unsendable(type(value).__name__)


def write_line(stream: BinaryIO, message: Mapping[str, Any]) -> None:
    """One message as a line of JSON."""
    stream.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")
    stream.flush()
