"""The picture of a confusion matrix, drawn with Pillow."""

import math
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from vit_jax import fonts
from vit_jax.data import listing

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

MAX_NAMED = 100  # classes whose names fit; of more, the picture has the cells alone
MAX_COUNTED = 30  # classes whose counts fit into the cells
SIDE = 1600  # of the cells of many classes together, pixels, at most
MAX_CELL, MIN_NAMED_CELL = 56, 15
MAX_NAME = 170  # width of a class name, pixels; longer ones are cut off
MARGIN, TITLE, GAP, FONT = 14, 18, 8, 13
BAR_WIDTH, BAR_TICKS = 18, (0, 1, 5, 10, 25, 50, 75, 100)
# From white to dark blue: a single hue, whose lightness falls steadily, so that it needs no color vision.
COLORS = ((255, 255, 255), (222, 235, 247), (158, 202, 225), (66, 146, 198), (8, 81, 156), (8, 48, 107))
GRID = (200, 200, 200)


def draw(counts: Int[np.ndarray, "classes classes"], names: tuple[str, ...], title: str) -> "Image":
    """Returns the picture of a confusion matrix: true classes in rows, predicted classes in columns.

    The color of a cell is the share of its row; the scale is the square root, so that rare confusions are visible.

    Args:
        counts: number of examples by true class (row) and predicted class (column).
        names: one per class; of more than 100 classes, they are not drawn.
        title: one line above the matrix.
    """
    from PIL import Image, ImageDraw

    count = len(names)
    cell = _cell(counts)
    is_named = count <= MAX_NAMED
    labels = [_text(name, min(FONT, cell - 4), MAX_NAME) for name in names] if is_named else []
    widest = max((label.width for label in labels), default=0)
    titles = [_text(text, FONT + 1, None) for text in ("true class", "predicted class")]
    head = _text(title, FONT + 3, None)
    left = MARGIN + TITLE + GAP + widest + GAP
    top = MARGIN + 3 * TITLE + widest + GAP
    side = count * cell
    bar_left = left + side + 2 * MARGIN
    width = max(bar_left + BAR_WIDTH + 60, left + titles[1].width, head.width + 2 * MARGIN)
    image = Image.new("RGB", (width, top + max(side, 160) + MARGIN), "white")
    pen = ImageDraw.Draw(image)
    image.paste(head, (MARGIN, MARGIN))
    image.paste(titles[1], (left, MARGIN + 2 * TITLE - 4))
    image.paste(titles[0].rotate(90, expand=True), (MARGIN, top))
    _draw_cells(image, counts, (left, top), cell)
    for index, label in enumerate(labels):
        middle = index * cell + cell // 2
        image.paste(label, (left - 6 - label.width, top + middle - label.height // 2))
        turned = label.rotate(90, expand=True)
        image.paste(turned, (left + middle - turned.width // 2, top - 6 - turned.height))
    pen.rectangle((left - 1, top - 1, left + side, top + side), outline=GRID)
    _draw_bar(pen, (bar_left, top), max(150, min(side, 400)))
    return image


def _cell(counts: Int[np.ndarray, "classes classes"]) -> int:
    """Returns the side of a cell in pixels: large enough for its count or its name, if these are drawn."""
    classes = len(counts)
    if classes > MAX_NAMED:
        return max(1, SIDE // classes)
    if classes > MAX_COUNTED:
        return max(MIN_NAMED_CELL, min(24, SIDE // classes))
    widest = max(_text(f"{counts.max()}", FONT, None).width, FONT)
    return max(widest + 8, min(MAX_CELL, 640 // classes))


def _draw_cells(image: "Image", counts: Int[np.ndarray, "classes classes"], corner: tuple[int, int], cell: int) -> None:
    from PIL import Image

    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    colors = color(shares)
    enlarged = colors.repeat(cell, axis=0).repeat(cell, axis=1)
    if cell >= MIN_NAMED_CELL:  # lines between the cells
        edges = np.arange(1, len(counts)) * cell
        enlarged[edges], enlarged[:, edges] = GRID, GRID
    image.paste(Image.fromarray(enlarged), corner)
    if len(counts) > MAX_COUNTED:
        return
    for row, column in np.argwhere(counts):
        background = tuple(colors[row, column].tolist())
        ink = "white" if np.dot(background, (0.299, 0.587, 0.114)) < 140 else "black"
        number = _text(f"{counts[row, column]}", FONT, None, ink, background)
        middle = (corner[0] + column * cell + cell // 2, corner[1] + row * cell + cell // 2)
        image.paste(number, (int(middle[0] - number.width // 2), int(middle[1] - number.height // 2)))


def _draw_bar(pen: "ImageDraw", corner: tuple[int, int], height: int) -> None:
    """Draws the scale of the colors beside the matrix, 100 % at the top."""
    left, top = corner
    for row in range(height):
        share = ((height - 1 - row) / (height - 1)) ** 2
        pen.line((left, top + row, left + BAR_WIDTH, top + row), fill=tuple(color(np.array(share)).tolist()))
    pen.rectangle((left, top, left + BAR_WIDTH, top + height - 1), outline=GRID)
    font, text = fonts.fit("of the row", FONT - 1)
    pen.text((left, top - 12), text, fill="black", font=font, anchor="ls")
    for tick in BAR_TICKS:
        font, text = fonts.fit(f"{tick} %", FONT - 1)
        row = top + (height - 1) * (1 - math.sqrt(tick / 100))
        pen.line((left + BAR_WIDTH, row, left + BAR_WIDTH + 4, row), fill="black")
        pen.text((left + BAR_WIDTH + 8, row), text, fill="black", font=font, anchor="lm")


def color(shares: np.ndarray) -> np.ndarray:
    """Returns the colors of shares from 0 to 1: uint8 [..., 3]."""
    position = np.sqrt(shares) * (len(COLORS) - 1)
    stops = np.arange(len(COLORS))
    channels = [np.interp(position, stops, [one[channel] for one in COLORS]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _text(
    text: str,
    size: int,
    max_width: int | None,
    ink: str = "black",
    background: str | tuple[int, ...] = "white",
) -> "Image":
    """Returns one line of text as a picture; one that is too wide is cut off and ends with an ellipsis."""
    from PIL import Image, ImageDraw

    font, text = fonts.fit(listing.printable(text), size)
    if max_width is not None and font.getlength(text) > max_width:
        while text and font.getlength(f"{text}...") > max_width:
            text = text[:-1]
        text = f"{text.rstrip()}..."
    ascent, descent = font.getmetrics()
    picture = Image.new("RGB", (max(1, math.ceil(font.getlength(text))), ascent + descent), background)
    ImageDraw.Draw(picture).text((0, 0), text, fill=ink, font=font)
    return picture
