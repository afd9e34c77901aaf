"""A small line chart with a logarithmic x axis, drawn with Pillow."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 80, 30, 50, 60  # pixels around the axes
INSET = 30  # pixels between the ends of the x axis and the outermost points
FONT_SIZE, NUM_TICKS = 15, 5
LINE, MARK, GRID = (31, 119, 180), (214, 39, 40), (221, 221, 221)


def draw(
    points: Sequence[tuple[float, float]], x_label: str, y_label: str, marked: float, min_span: float = 0.0
) -> "Image":
    """Returns a chart of the points, joined by a line in the order of x.

    Args:
        points: one or more pairs (x, y); x must be positive.
        x_label: label of the x axis.
        y_label: label of the y axis.
        marked: x of the point that is highlighted and labelled with its y.
        min_span: minimum range of the y axis, which is extended downward.
    """
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(FONT_SIZE)
    points = sorted(points)
    high = max(y for _, y in points)
    y_ticks = ticks(min(high - min_span, *(y for _, y in points)), high)
    axes = _Axes([math.log10(x) for x, _ in points], y_ticks)
    for tick in y_ticks:
        row = axes.row(tick)
        pen.line([(LEFT, row), (WIDTH - RIGHT, row)], fill=GRID)
        pen.text((LEFT - 8, row), f"{tick:g}", fill="black", font=font, anchor="rm")
    pixels = [(axes.column(math.log10(x)), axes.row(y)) for x, y in points]
    pen.line(pixels, fill=LINE, width=2)
    for (x, y), (column, row) in zip(points, pixels, strict=True):
        pen.text((column, HEIGHT - BOTTOM + 10), f"{x:g}", fill="black", font=font, anchor="mt")
        color, radius = (MARK, 6) if x == marked else (LINE, 4)
        pen.ellipse([column - radius, row - radius, column + radius, row + radius], fill=color)
        if x == marked:
            pen.text((column, row - 10), f"{y:.4g}", fill=color, font=font, anchor="mb")
    pen.text((WIDTH / 2, HEIGHT - 8), x_label, fill="black", font=font, anchor="mb")
    pen.text((8, 6), y_label, fill="black", font=font, anchor="lt")
    return image


def ticks(low: float, high: float) -> list[float]:
    """Returns about five evenly spaced round numbers, the first at most `low` and the last at least `high`."""
    rough = (high - low or abs(high) or 1.0) / NUM_TICKS
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]


class _Axes:
    """Converts coordinates to pixels."""

    def __init__(self, x: Sequence[float], y: Sequence[float]):
        self._low, self._high = min(x), max(x)
        self._bottom, self._top = min(y), max(y)

    def column(self, x: float) -> float:
        fraction = (x - self._low) / (self._high - self._low) if self._high > self._low else 0.5
        return LEFT + INSET + fraction * (WIDTH - LEFT - RIGHT - 2 * INSET)

    def row(self, y: float) -> float:
        fraction = (y - self._bottom) / (self._top - self._bottom)
        return HEIGHT - BOTTOM - fraction * (HEIGHT - TOP - BOTTOM)
