"""Charts as inline SVG, whose colors are those of the page's theme."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from vit_jax.chart import ticks
from vit_jax.reporting.html import Html, element

WIDTH, HEIGHT = 340, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 10, 38  # around the axes
NUM_COLORS = 8  # classes s1 to s8 of page.css
MAX_MARKED = 60  # points that are drawn as dots
MAX_HOVERED = 600  # values in tooltips
SQUARE = 260  # side of the reliability diagram


class Point(NamedTuple):
    """A value at a step; `spread` is its standard deviation, None if there is none. A NaN interrupts the line."""

    step: int
    value: float
    spread: float | None = None


class Series(NamedTuple):
    """A line of a chart: its name in the legend, the number of its color and dashes (from 0), and its points."""

    name: str
    color: int
    points: tuple[Point, ...]


def number(value: float) -> str:
    """Returns a number as tables have it, with six digits."""
    return "–" if not math.isfinite(value) else f"{value:.6g}"


def lines(identifier: str, title: str, series: Sequence[Series]) -> Html:
    """Returns a line chart against the step; bands are one standard deviation to each side.

    Args:
        identifier: of the element, unique in the page.
        title: of the chart, for screen readers.
        series: with at least one finite value.
    """
    finite = [point for one in series for point in one.points if math.isfinite(point.value)]
    ends = [point.value + sign * (point.spread or 0.0) for point in finite for sign in (-1, 1)]
    axes = _Axes(max(point.step for point in finite), ticks(min(ends), max(ends)))
    drawn = [part for one in series for part in (*_bands(one, axes), *_line(one, axes))]
    described = element("title", f"{title}: {', '.join(one.name for one in series)}", id=f"{identifier}-title")
    labelled = {"role": "img", "aria_labelledby": f"{identifier}-title", "id": identifier, "class_": "plot"}
    return element(
        "svg", described, *axes.draw(), *drawn, *_hover(series, axes), viewBox=f"0 0 {WIDTH} {HEIGHT}", **labelled
    )


def legend(series: Sequence[Series]) -> Html:
    """Returns the names of the lines with samples of them."""
    items = []
    for one in series:
        line = element("path", d="M1 6H25", class_=_class("line", one.color))
        items.append(element("li", element("svg", line, viewBox="0 0 26 12", aria_hidden="true"), one.name))
    return element("ul", *items, class_="legend")


class _Axes:
    """Converts steps and values to coordinates, and draws the grid."""

    def __init__(self, last_step: int, values: Sequence[float]):
        self._last, self._ticks = max(last_step, 1), values

    def x(self, step: float) -> float:
        return LEFT + step / self._last * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self._ticks[0], self._ticks[-1]
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def draw(self) -> list[Html]:
        parts = []
        for value in self._ticks:
            y = self.y(value)
            parts += [_path(f"M{LEFT} {y:.1f}H{WIDTH - RIGHT}", "grid"), _text(LEFT - 6, y + 4, _tick(value), "end")]
        for step in (step for step in ticks(0, self._last) if step <= self._last):
            x, low = self.x(step), HEIGHT - BOTTOM
            parts += [_path(f"M{x:.1f} {low}v4", "axis"), _text(x, low + 16, _tick(step))]
        parts.append(_path(f"M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}", "axis"))
        return [*parts, _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, "step")]


def _tick(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 and value == round(value) else f"{value:g}"


def _class(kind: str, color: int) -> str:
    """Returns the classes of a line; after all colors, they are used again with dashes."""
    return f"{kind} s{color % NUM_COLORS + 1}" + (" dashed" if color >= NUM_COLORS else "")


def _path(d: str, class_: str) -> Html:
    return element("path", d=d, class_=class_)


def _text(x: float, y: float, content: str, anchor: str = "middle") -> Html:
    return element("text", content, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


def _pieces(points: Sequence[Point]) -> list[list[Point]]:
    """Returns the parts of a line between values that are not finite."""
    pieces: list[list[Point]] = [[]]
    for point in points:
        if math.isfinite(point.value):
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _line(series: Series, axes: _Axes) -> list[Html]:
    parts = []
    for piece in _pieces(series.points):
        corners = [f"{axes.x(point.step):.1f} {axes.y(point.value):.1f}" for point in piece]
        parts.append(_path(f"M{'L'.join(corners)}", _class("line", series.color)))
        if len(series.points) <= MAX_MARKED or len(piece) == 1:
            # A line of no length has a round cap: a dot.
            parts.append(_path("".join(f"M{corner}h0" for corner in corners), _class("dots", series.color)))
    return parts


def _bands(series: Series, axes: _Axes) -> list[Html]:
    parts = []
    for piece in _pieces([point for point in series.points if point.spread is not None]):
        if len(piece) > 1:
            edges = [[(point.step, point.value + sign * point.spread) for point in piece] for sign in (1, -1)]
            around = [*edges[0], *reversed(edges[1])]
            corners = "L".join(f"{axes.x(step):.1f} {axes.y(value):.1f}" for step, value in around)
            parts.append(_path(f"M{corners}Z", _class("band", series.color)))
    return parts


def _hover(series: Sequence[Series], axes: _Axes) -> list[Html]:
    """Returns invisible stripes with the values of their step as tooltips."""
    steps = thin(
        sorted({point.step for one in series for point in one.points}), max(MAX_HOVERED // (2 + len(series)), 10)
    )
    values = [{point.step: point for point in one.points} for one in series]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(steps)]
    parts = []
    for step, left, right in zip(steps, [0, *middles], [*middles, steps[-1]], strict=True):
        rows = [
            f"{one.name}: {number(found[step].value)}"
            + (f" ± {number(found[step].spread)}" if found[step].spread is not None else "")
            for one, found in zip(series, values, strict=True)
            if step in found
        ]
        stripe = element(
            "rect",
            x=f"{axes.x(left):.1f}",
            y=TOP,
            width=f"{max(axes.x(right) - axes.x(left), 1):.1f}",
            height=HEIGHT - TOP - BOTTOM,
        )
        guide = _path(f"M{axes.x(step):.1f} {TOP}V{HEIGHT - BOTTOM}", "guide")
        parts.append(
            element("g", element("title", "\n".join([f"step {step:,}", *rows])), stripe, guide, class_="hover")
        )
    return parts


def thin(items: Sequence, count: int) -> list:
    """Returns about `count` evenly spaced items of a longer sequence, the last one among them."""
    stride = math.ceil(len(items) / count) if items else 1
    return [*reversed(list(reversed(items))[::stride])]


def reliability(identifier: str, rows: Sequence[tuple[float, float, int, float | None, float | None]]) -> Html:
    """Returns the reliability diagram of arXiv 1706.04599 (figure 1): accuracy against probability, in bins.

    Args:
        identifier: of the element, unique in the page.
        rows: of each bin, from low to high: its limits, number of examples, mean probability and accuracy.
    """
    left, bottom, side = LEFT, 40, SQUARE
    top = 10

    def at(x: float, y: float) -> tuple[float, float]:
        return left + x * side, top + (1 - y) * side

    parts = []
    for tick in (0, 0.2, 0.4, 0.6, 0.8, 1):
        (x, low), (_, y) = at(tick, 0), at(0, tick)
        parts += [_path(f"M{left} {y:.1f}h{side}", "grid"), _text(left - 6, y + 4, f"{100 * tick:g}", "end")]
        parts.append(_text(x, low + 16, f"{100 * tick:g}"))
    for low, high, examples, probability, accuracy in rows:
        if not examples:
            continue
        (x, y), (right, ground) = at(low, accuracy), at(high, 0)
        tip = f"probability {100 * low:.1f} to {100 * high:.1f} %\n{examples:,} images\nmean probability "
        tip += f"{100 * probability:.2f} %\naccuracy {100 * accuracy:.2f} %"
        size = {"x": f"{x + 1:.1f}", "width": f"{right - x - 2:.1f}"}
        bar = element("rect", y=f"{y:.1f}", height=f"{ground - y:.1f}", class_="bar", **size)
        mark_x, mark_y = at(probability, accuracy)
        mark = element("circle", cx=f"{mark_x:.1f}", cy=f"{mark_y:.1f}", r=3.5, class_="mark")
        full = element("rect", y=top, height=side, class_="catch", **size)
        parts.append(element("g", element("title", tip), bar, mark, full))
    parts.append(_path(f"M{left} {top + side}l{side} {-side}", "diagonal"))
    parts.append(_path(f"M{left} {top + side}h{side}", "axis"))
    parts.append(_text(left + side / 2, top + side + 34, "probability of the predicted class, %"))
    parts.append(
        element("text", "accuracy, %", transform=f"translate(12 {top + side / 2}) rotate(-90)", class_="middle")
    )
    title = element("title", "Reliability diagram: accuracy against probability", id=f"{identifier}-title")
    size = f"0 0 {left + side + RIGHT} {top + side + bottom}"
    labelled = {"role": "img", "aria_labelledby": f"{identifier}-title", "id": identifier, "class_": "plot square"}
    return element("svg", title, *parts, viewBox=size, **labelled)
