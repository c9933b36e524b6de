"""The input of a command: its lines, their schema, and the triples they hold."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from asap.errors import AsapError, InvalidInput
from asap.types import Triple
from asap_cli.terminal import printable
from asap_runtime.datasets import Line, read_lines
from asap_runtime.schemas import SCHEMAS, Schema, detect_schema, read_triples, to_triple

PEEK = 32
"""Lines read ahead to detect the schema."""
SAMPLES = 3


@dataclass(slots=True)
class Source:
    """An opened data set with a known schema."""

    name: str
    schema: Schema
    _head: list[Line]
    _rest: Iterator[Line]

    @classmethod
    def open(cls, name: str, schema: Schema | None) -> Source:
        """Read the first lines and detect the schema, unless it is given.

        A file without a readable line is left to `triples`, which gives every line's error.
        """
        lines = read_lines(name)
        head = list(islice(lines, PEEK))
        if not head:
            raise InvalidInput(f"{name!r} holds no line")
        rows = [line.row for line in head if line.row is not None]
        schema = schema or detect_schema(rows)
        if schema is None:
            if rows:
                raise InvalidInput(
                    f"no known schema in {name!r}: line {head[0].number} has the fields "
                    f"{', '.join(map(repr, rows[0]))}; expected one of: "
                    + "; ".join(f"{key} ({text})" for key, text in SCHEMAS.items())
                )
            schema = "triple"
        return cls(name, schema, head, lines)

    def triples(self) -> Iterator[tuple[int, Triple | AsapError]]:
        """(line number, triple or what is wrong with the line), once, in order."""
        return read_triples(chain(self._head, self._rest), self.schema)

    def introduce(self, console: Console, *, ask: bool) -> None:
        """Show the schema with three samples; on a terminal, ask whether it is right."""
        console.print(
            f"[bold]{self.name}[/]: schema [bold]{self.schema}[/] ({SCHEMAS[self.schema]})",
            highlight=False,
        )
        table = Table("line", "question", "CoT", "answer", box=None, header_style="dim")
        for line in self._head[:SAMPLES]:
            table.add_row(str(line.number), *self._sample(line))
        console.print(table)
        if ask and _has_terminal(console) and not typer.confirm("Is this right?", default=True):
            raise InvalidInput("name the schema with --schema: " + ", ".join(SCHEMAS))

    def _sample(self, line: Line) -> tuple[Text, ...]:
        try:
            if line.row is None:
                raise line.error or InvalidInput("unreadable")
            triple = to_triple(line.row, self.schema)
        except AsapError as error:
            return (
                Text(f"rejected: {error.detail}", style="red", overflow="ellipsis"),
                Text(),
                Text(),
            )
        return tuple(
            Text(printable(" ".join(text.split())[:60]), no_wrap=True, overflow="ellipsis")
            for text in (triple.question, triple.cot, triple.answer)
        )


def _has_terminal(console: Console) -> bool:
    """Somebody reads what is asked and can answer."""
    return console.is_terminal and sys.stdin.isatty()
