"""The picture of predictions: a sheet of the images, with the most probable classes below each."""

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from vit_jax import fonts
from vit_jax.data import images, listing
from vit_jax.errors import UserError, one_line
from vit_jax.inference import Prediction

SIDE = 192  # of the square that an image is drawn in, pixels
LINE = 16  # height of a line of text
GAP = 8
COLUMNS = 6
MAX_IMAGES = 60
TOP = 3  # classes per image and head
BAR = "#9ecae1"  # color of the bar of a class, whose length is its probability


def write(predictions: Sequence[Prediction], path: Path, option: str) -> str:
    """Writes the sheet of the first `MAX_IMAGES` predictions; returns a line about it.

    Args:
        predictions: for image files.
        path: of the picture; its suffix is its format.
        option: the flag and its value, for error messages.

    Raises:
        UserError: the file cannot be written.
    """
    drawn = draw(predictions[:MAX_IMAGES])
    try:
        drawn.save(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{option} cannot be written: {one_line(error)}\n  use a file name that ends in .png"
        ) from error
    some = f"the first {MAX_IMAGES} of " if len(predictions) > MAX_IMAGES else ""
    return f"wrote {path}: {some}{len(predictions):,} images, {drawn.width}x{drawn.height} pixels"


def draw(predictions: Sequence[Prediction]) -> Image.Image:
    """Returns the sheet: the images in rows, whole and in their own colors, with a bar and a percentage per class."""
    lines = [_lines(prediction) for prediction in predictions]
    columns, below = min(COLUMNS, len(predictions)), LINE * (1 + max(map(len, lines))) + GAP
    rows = math.ceil(len(predictions) / columns)
    sheet = Image.new("RGB", (columns * (SIDE + GAP) + GAP, rows * (SIDE + below) + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (prediction, classes) in enumerate(zip(predictions, lines, strict=True)):
        left, top = GAP + index % columns * (SIDE + GAP), GAP + index // columns * (SIDE + below)
        picture = _fitted(images.load(Path(prediction.image), 3))
        sheet.paste(picture, (left + (SIDE - picture.width) // 2, top + SIDE - picture.height))
        _write(pen, (left, top + SIDE), listing.printable(Path(prediction.image).name), "grey")
        for row, (label, probability) in enumerate(classes, start=1):
            corner = (left, top + SIDE + row * LINE)
            pen.rectangle((*corner, left + round(SIDE * probability), corner[1] + LINE - 2), fill=BAR)
            _write(pen, corner, f"{100 * probability:.0f} %  {listing.printable(label)}", "black")
    return sheet


def _fitted(picture: Image.Image) -> Image.Image:
    """Returns an image that fits the square: a small one enlarged by a whole factor, a large one reduced."""
    factor = max(1, SIDE // max(picture.size))
    picture = picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST)
    picture.thumbnail((SIDE, SIDE))
    return picture


def _lines(prediction: Prediction) -> list[tuple[str, float]]:
    return [(guess.label, guess.probability) for guesses in prediction.heads.values() for guess in guesses[:TOP]]


def _write(pen: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, color: str) -> None:
    font, text = fonts.fit(text, LINE - 4)
    while text and pen.textlength(text, font=font) > SIDE:
        text = text[:-1]
    pen.text(corner, text, fill=color, font=font)
