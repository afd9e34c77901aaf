"""Images inside the page."""

import base64
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import UInt8

from vit_jax.reporting.html import Html, element

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_SIDE = 128  # pixels of an image among others; larger ones are reduced
PIXELATED = 48  # images of at most this side are enlarged without smoothing
MAX_BYTES = 150_000  # of a figure
RESOLUTIONS = (120, 90, 70, 50, 30)  # dots per inch of a figure: the first that gives a file of at most MAX_BYTES


class Tile(NamedTuple):
    """An image with lines of text: `lines` below it, `description` for screen readers."""

    image: UInt8[np.ndarray, "height width channels"]
    lines: tuple[str, ...]
    description: str


def tiles(found: Sequence[Tile]) -> Html:
    """Returns the images in rows, as many per row as fit."""
    return element("ul", *(element("li", _figure(tile)) for tile in found), class_="tiles")


def _figure(tile: Tile) -> Html:
    height, width = tile.image.shape[:2]
    crisp = "crisp" if max(height, width) <= PIXELATED else None
    picture = element("img", src=_uri(tile.image), alt=tile.description, width=width, height=height, class_=crisp)
    lines = (element("span", line) for line in tile.lines)
    return element("figure", picture, element("figcaption", *lines))


def _uri(image: UInt8[np.ndarray, "height width channels"]) -> str:
    """Returns a data URI: of small images the exact pixels, of large ones a JPEG file."""
    from PIL import Image

    gray = image.shape[2] < 3
    picture, file = Image.fromarray(image[..., 0] if gray else image[..., :3]), io.BytesIO()
    if max(picture.size) <= PIXELATED:
        picture.save(file, "PNG", optimize=True)
        return data_uri(file.getvalue(), "png")
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    picture.save(file, "JPEG", quality=85)
    return data_uri(file.getvalue(), "jpeg")


def data_uri(content: bytes, kind: str) -> str:
    """Returns the content of an image file as an address."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def file_of(figure: "Figure") -> bytes:
    """Returns a figure of matplotlib as an image file of limited size: PNG, or JPEG if it has photos."""
    from PIL import Image

    for resolution in RESOLUTIONS:
        file, smaller = io.BytesIO(), io.BytesIO()
        figure.savefig(file, format="png", dpi=resolution, bbox_inches="tight", facecolor="white")
        if file.tell() <= MAX_BYTES:
            return file.getvalue()
        Image.open(file).convert("RGB").save(smaller, "JPEG", quality=85)
        if smaller.tell() <= MAX_BYTES:
            break
    return smaller.getvalue()


def picture(content: bytes, description: str, wide_from: float = math.inf) -> Html:
    """Returns the file of a picture that is drawn on white; of the class 'wide' if its width over height is larger."""
    from PIL import Image

    with Image.open(io.BytesIO(content)) as opened:
        width, height, kind = *opened.size, opened.format.lower()
    class_ = "white wide" if width > wide_from * height else "white"
    return element("img", src=data_uri(content, kind), alt=description, width=width, height=height, class_=class_)
