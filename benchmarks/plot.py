"""Line charts with logarithmic axes as SVG. No dependency; the text is meant to be diffed."""

import math
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

_WIDTH: Final = 720
_HEIGHT: Final = 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 30, 46, 96  # margins for labels, title and legend
_LEGEND_WIDTH: Final = 165
_FONT: Final = "font-family='sans-serif' font-size='12' fill='#333'"
_MINOR: Final = (1, 2, 5)  # where a decade has lines


class Line(NamedTuple):
    """One curve: *points* are (x, y), both above zero."""

    title: str
    color: str
    dash: str  # "" draws through
    points: Sequence[tuple[float, float]]


def render(title: str, x_title: str, y_title: str, lines: Sequence[Line]) -> str:
    """Return the chart. Raises ValueError without a point."""
    points = [point for line in lines for point in line.points]
    if not points:
        raise ValueError(f"cannot draw {title!r} without a point")
    x_axis = _Axis([x for x, _ in points], _LEFT, _WIDTH - _RIGHT, ticks=_unique(points))
    y_axis = _Axis([y for _, y in points], _HEIGHT - _BOTTOM, _TOP)
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {_HEIGHT}'"
        f" width='{_WIDTH}' height='{_HEIGHT}' role='img'>",
        f"<title>{title}</title>",
        f"<rect width='{_WIDTH}' height='{_HEIGHT}' fill='#fff'/>",
        f"<text x='{_LEFT}' y='24' {_FONT} font-weight='bold'>{title}</text>",
        *_grid(x_axis, y_axis),
        _text(_LEFT, _TOP - 8, y_title),
        _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - _BOTTOM + 36, x_title, "middle"),
    ]
    for number, line in enumerate(lines):
        parts += _curve(line, x_axis, y_axis)
        parts += _legend(line, _LEFT + number * _LEGEND_WIDTH, _HEIGHT - 22)
    return "\n".join([*parts, "</svg>", ""])


class _Axis:
    """A logarithmic axis from *start* to *end*, in pixels."""

    def __init__(
        self, values: Sequence[float], start: float, end: float, ticks: Sequence[float] = ()
    ) -> None:
        self.ticks = ticks or _round_numbers(min(values), max(values))
        self._low = math.log10(min(*self.ticks, *values))
        self._span = (math.log10(max(*self.ticks, *values)) - self._low) or 1.0
        self._start, self._end = start, end

    def at(self, value: float) -> float:
        share = (math.log10(value) - self._low) / self._span
        return round(self._start + share * (self._end - self._start), 1)


def _unique(points: Sequence[tuple[float, float]]) -> list[float]:
    found = sorted({x for x, _ in points})
    # One size alone has no axis to speak of; a decade makes one.
    return found if len(found) > 1 else [found[0], found[0] * 10]


def _round_numbers(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten, from the last not above *low* to the first not below *high*."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    numbers = [step * 10.0**exponent for exponent in exponents for step in _MINOR]
    first = max(number for number in numbers if number <= low * 1.000001)
    last = min(number for number in numbers if number >= high * 0.999999)
    return [number for number in numbers if first <= number <= max(last, first * 2)]


def _grid(x_axis: _Axis, y_axis: _Axis) -> list[str]:
    parts = []
    for value in x_axis.ticks:
        x = x_axis.at(value)
        parts.append(_stroke(x, _TOP, x, _HEIGHT - _BOTTOM))
        parts.append(_text(x, _HEIGHT - _BOTTOM + 18, f"{value:,.0f}", "middle"))
    for value in y_axis.ticks:
        y = y_axis.at(value)
        parts.append(_stroke(_LEFT, y, _WIDTH - _RIGHT, y))
        parts.append(_text(_LEFT - 8, y + 4, f"{value:,g}", "end"))
    return parts


def _curve(line: Line, x_axis: _Axis, y_axis: _Axis) -> list[str]:
    places = [(x_axis.at(x), y_axis.at(y)) for x, y in line.points]
    path = " ".join(f"{x},{y}" for x, y in places)
    style = f"stroke='{line.color}' stroke-width='2' stroke-dasharray='{line.dash}'"
    return [
        f"<polyline points='{path}' fill='none' {style}/>",
        *(f"<circle cx='{x}' cy='{y}' r='3.5' fill='{line.color}'/>" for x, y in places),
    ]


def _legend(line: Line, x: float, y: float) -> list[str]:
    style = f"stroke='{line.color}' stroke-width='2' stroke-dasharray='{line.dash}'"
    return [
        f"<line x1='{x}' y1='{y - 4}' x2='{x + 28}' y2='{y - 4}' {style}/>",
        f"<circle cx='{x + 14}' cy='{y - 4}' r='3.5' fill='{line.color}'/>",
        _text(x + 36, y, line.title),
    ]


def _stroke(x1: float, y1: float, x2: float, y2: float) -> str:
    return f"<line x1='{x1}' y1='{y1}' x2='{x2}' y2='{y2}' stroke='#ddd'/>"


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f"<text x='{x}' y='{y}' {_FONT} text-anchor='{anchor}'>{text}</text>"


#: How each backend and layout is drawn, in every chart.
STYLES: Final[Mapping[tuple[str, str], tuple[str, str]]] = {
    ("nft", "tree"): ("#1f6fb4", ""),
    ("nft", "flat"): ("#1f6fb4", "6 4"),
    ("legacy", "tree"): ("#d9601a", ""),
    ("legacy", "flat"): ("#d9601a", "6 4"),
}
