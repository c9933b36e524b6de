"""Line plots as numbers for an SVG: where points, ticks and labels lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Line", "Plot", "make_plot", "ticks"]

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 26, 26, 40
# Okabe and Ito's colours, told apart by most people who see few colours.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")


@dataclass(frozen=True, slots=True)
class Line:
    """One model: points in pixels, each with the text to show at it."""

    name: str
    colour: str
    points: tuple[tuple[float, float, str], ...]

    @property
    def path(self) -> str:
        """For a polyline."""
        return " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in self.points)


@dataclass(frozen=True, slots=True)
class Plot:
    """Everything that a template draws, in pixels from the upper left corner."""

    title: str
    x_label: str
    y_label: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    lines: tuple[Line, ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def make_plot(
    title: str,
    x_label: str,
    y_label: str,
    curves: Sequence[tuple[str, Sequence[tuple[float, float, str]]]],
) -> Plot:
    """A plot of one or more named curves, each of one or more points (x, y, text)."""
    xs = ticks([x for _, points in curves for x, _, _ in points])
    ys = ticks([y for _, points in curves for _, y, _ in points])

    def across(x: float) -> float:
        return LEFT + (x - xs[0]) / (xs[-1] - xs[0]) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (y - ys[0]) / (ys[-1] - ys[0]) * (HEIGHT - TOP - BOTTOM)

    return Plot(
        title,
        x_label,
        y_label,
        tuple((across(x), f"{x:,g}") for x in xs),
        tuple((down(y), f"{y:,g}") for y in ys),
        tuple(
            Line(
                name,
                COLOURS[number % len(COLOURS)],
                tuple((across(x), down(y), text) for x, y, text in points),
            )
            for number, (name, points) in enumerate(curves)
        ),
    )


def ticks(values: Sequence[float]) -> list[float]:
    """Four to eight round numbers, the first at most the least value, the last at least the
    greatest; never all the same.
    """
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if span / (power * m) <= 6)
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    return [round(step * n, 10) for n in range(first, last + 1)]
