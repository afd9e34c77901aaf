"""A small chart, drawn with Pillow alone: points over a logarithmic axis."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 80, 30, 30, 60  # of the frame, pixels
TEXT, TICKS = 15, 5
LINE, MARK, GRID = (31, 119, 180), (214, 39, 40), (221, 221, 221)


def draw(points: Sequence[tuple[float, float]], across: str, up: str, marked: float) -> "Image":
    """Points joined by a line, in the order of their first number, which is above 0 and has a logarithmic axis.

    Args:
        points: (x, y); one at least.
        across: what x is.
        up: what y is.
        marked: the x of the point that stands out, with its y beside it.
    """
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(TEXT)
    points = sorted(points)
    heights = ticks(min(y for _, y in points), max(y for _, y in points))
    place = _Place([math.log10(x) for x, _ in points], heights)
    for height in heights:
        row = place.y(height)
        pen.line([(LEFT, row), (WIDTH - RIGHT, row)], fill=GRID)
        pen.text((LEFT - 8, row), f"{height:g}", fill="black", font=font, anchor="rm")
    places = [(place.x(math.log10(x)), place.y(y)) for x, y in points]
    pen.line(places, fill=LINE, width=2)
    for (x, y), (column, row) in zip(points, places, strict=True):
        pen.text((column, HEIGHT - BOTTOM + 10), f"{x:g}", fill="black", font=font, anchor="mt")
        color, radius = (MARK, 6) if x == marked else (LINE, 4)
        pen.ellipse([column - radius, row - radius, column + radius, row + radius], fill=color)
        if x == marked:
            pen.text((column, row - 10), f"{y:.4g}", fill=color, font=font, anchor="mb")
    pen.text((WIDTH / 2, HEIGHT - 8), across, fill="black", font=font, anchor="mb")
    pen.text((8, 6), up, fill="black", font=font, anchor="lt")
    return image


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, evenly apart, from below `low` to above `high`: about five of them."""
    rough = (high - low or abs(high) or 1.0) / TICKS
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]


class _Place:
    """From numbers to pixels."""

    def __init__(self, across: Sequence[float], up: Sequence[float]):
        self._low, self._high = min(across), max(across)
        self._bottom, self._top = min(up), max(up)

    def x(self, value: float) -> float:
        margin = 30
        share = (value - self._low) / (self._high - self._low) if self._high > self._low else 0.5
        return LEFT + margin + share * (WIDTH - LEFT - RIGHT - 2 * margin)

    def y(self, value: float) -> float:
        share = (value - self._bottom) / (self._top - self._bottom)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)
