"""Line charts in plain SVG: where the marks stand. `chart.html` draws them, `chart.js` reads them out."""

import dataclasses
import math
from collections.abc import Sequence

from jlora._typing import JsonObject

WIDTH, HEIGHT = 640, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 10, 30
"""Of the plot in the drawing, whose units these are; words of twice the size have room too."""

COLOURS, DASHES = 6, 4
"""Of `style.css`."""

MOST_POINTS = 600
"""Of a series: more than a screen has columns. Of longer ones the lowest and highest of each stretch are drawn."""


@dataclasses.dataclass(frozen=True)
class Series:
    """A line.

    Args:
        points: (x, y) by rising x; a y that is None, for one that is not finite, leaves a gap.
        marked: with a dot at every point, for few of them.
    """

    name: str
    points: Sequence[tuple[float, float | None]]
    marked: bool = False

    @property
    def finite(self) -> list[tuple[float, float]]:
        return [(x, y) for x, y in self.points if y is not None]


@dataclasses.dataclass(frozen=True)
class Chart:
    """Lines over one axis.

    Args:
        name: unique on its page, of letters, digits and hyphens.
        unit: of y, in words.
        from_zero: the axis of y begins at zero.

    Raises:
        ValueError: when there is no finite point to draw.
    """

    name: str
    title: str
    unit: str
    series: Sequence[Series]
    x: str = "step"
    from_zero: bool = False

    def __post_init__(self):
        if not self._values:
            raise ValueError(f"The chart {self.title!r} has no finite point to draw.")

    @property
    def _values(self) -> list[float]:
        return [y for series in self.series for _, y in series.finite]

    @property
    def width(self) -> int:
        return WIDTH

    @property
    def height(self) -> int:
        return HEIGHT

    @property
    def plot(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom."""
        return LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM

    @property
    def x_range(self) -> tuple[float, float]:
        xs = [x for series in self.series for x, _ in series.points]
        return (min(xs), max(xs)) if min(xs) < max(xs) else (min(xs) - 1, max(xs) + 1)

    @property
    def y_range(self) -> tuple[float, float]:
        low, high = min(self._values), max(self._values)
        if self.from_zero:
            low, high = min(low, 0.0), max(high, 0.0)
        room = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
        return low - (0 if self.from_zero and low == 0 else room), high + room

    @property
    def x_ticks(self) -> list[tuple[float, str]]:
        """(place in the drawing, words)."""
        low, high = self.x_range
        return [(self._across(x), label(x)) for x in ticks(low, high, 6) if x == int(x)]

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        return [(self._up(y), label(y)) for y in ticks(*self.y_range, 5)]

    def _across(self, x: float) -> float:
        low, high = self.x_range
        left, _, right, _ = self.plot
        return round(left + (x - low) / (high - low) * (right - left), 1)

    def _up(self, y: float) -> float:
        low, high = self.y_range
        _, top, _, bottom = self.plot
        return round(bottom - (y - low) / (high - low) * (bottom - top), 1)

    @property
    def drawn(self) -> list[JsonObject]:
        """Of each series: its name and look, the path of its line, and its dots."""
        lines = []
        for number, series in enumerate(self.series):
            points = thinned(series.points)
            path, pen = [], "M"
            for x, y in points:
                path += [] if y is None else [f"{pen}{self._across(x)} {self._up(y)}"]
                pen = "M" if y is None else "L"
            dots = (
                [(self._across(x), self._up(y)) for x, y in series.finite] if series.marked or len(points) == 1 else []
            )
            lines.append({"name": series.name, **look(number), "path": "".join(path), "dots": dots})
        return lines

    @property
    def readings(self) -> JsonObject:
        """What `chart.js` reads out."""
        return {
            "x": self.x, "unit": self.unit, "x_range": self.x_range, "y_range": self.y_range, "plot": self.plot,
            "series": [
                {"name": s.name, **look(number), "points": thinned(s.points)}
                for number, s in enumerate(self.series)
            ],
        }  # fmt: skip

    @property
    def described(self) -> str:
        """The chart in words, for those who do not see it."""
        return " ".join(self._in_words(series.name, series.finite) for series in self.series)

    def _in_words(self, name: str, points: Sequence[tuple[float, float]]) -> str:
        if not points:
            return f"{name}: no finite value."
        by_value = sorted(points, key=lambda point: point[1])
        first, last, lowest, highest = (
            f"{label(y)} at {self.x} {label(x)}" for x, y in (points[0], points[-1], by_value[0], by_value[-1])
        )
        return f"{name}: from {first} to {last}; lowest {lowest}, highest {highest}."

    @property
    def left_out(self) -> str:
        """What of the series is not drawn, in words; empty: all of it is."""
        gaps = sum(len(series.points) - len(series.finite) for series in self.series)
        said = [f"{gaps} {'value is' if gaps == 1 else 'values are'} not finite and not drawn"] if gaps else []
        if any(len(series.points) > MOST_POINTS for series in self.series):
            said.append("of long stretches the lowest and the highest values are drawn")
        return "; ".join(said)


def look(number: int) -> JsonObject:
    """Of the line of this number: colour and dash, so that none is told by its colour alone; 24 pairs."""
    return {"colour": number % COLOURS, "dash": (number + number // 12) % DASHES}


def label(value: float) -> str:
    """A number in four significant digits, as short as they allow.

    >>> [label(v) for v in (0, 12, 1234567.0, 3.14159, 0.0125, 0.00025, 1500.0, 3e12)]
    ['0', '12', '1,234,567', '3.142', '0.0125', '2.5e-4', '1,500', '3e12']
    """
    size = abs(value)
    if size >= 1e9 or 0 < size < 1e-3:
        digits, exponent = f"{value:.3e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value:,.0f}" if size >= 1000 or value == int(value) else f"{value:.4g}"


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most so many round numbers in a range, 1, 2 or 5 times a power of ten apart.

    >>> ticks(0.0, 1.0, 6), ticks(2.9, 4.2, 5)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [3.0, 3.5, 4.0])
    """
    least = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(least))
    step = next(unit * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (unit * factor) <= most - 1)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{n * step:.12g}") for n in range(first, last + 1)]


def thinned(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """At most about `MOST_POINTS` of the points, with the envelope of all of them; each gap, the first and the last among them."""
    if len(points) <= MOST_POINTS:
        return list(points)
    kept = {0, len(points) - 1}
    stretches = MOST_POINTS // 2
    for n in range(stretches):
        where = range(n * len(points) // stretches, (n + 1) * len(points) // stretches)
        finite = {i: y for i in where if (y := points[i][1]) is not None}
        kept.update(set(where).difference(finite))
        if finite:
            kept.update((min(finite, key=finite.__getitem__), max(finite, key=finite.__getitem__)))
    return [points[i] for i in sorted(kept)]
