"""How images of any size become images of the model's size: resized, then cropped at the center.

Training has one way, `COVER`. Models of other projects were evaluated in others, which their files record: those of
timm's `create_transform(..., is_training=False)` and of the image processors of transformers.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vit_jax.errors import UserError

_MAX_EXCESS = 16  # an image that covers more than this multiple of the requested size is cropped before it is resized
# Filters of Pillow, and the pixels that each reaches.
FILTERS = {
    "nearest": (Image.Resampling.NEAREST, 0.5),
    "box": (Image.Resampling.BOX, 0.5),
    "bilinear": (Image.Resampling.BILINEAR, 1),
    "hamming": (Image.Resampling.HAMMING, 1),
    "bicubic": (Image.Resampling.BICUBIC, 2),
    "lanczos": (Image.Resampling.LANCZOS, 3),
}
MODES = ("center", "squash", "border", "none")
RULES = ("vit_jax", "timm", "transformers")


@dataclasses.dataclass(frozen=True)
class Preparation:
    """How an image is resized and cropped; the defaults are those of training.

    Attributes:
        crop_mode: what is resized to the requested size divided by `crop_pct`: the shorter side ('center'), both sides
            ('squash'), the longer side ('border'), or nothing ('none'). What is missing of the size is padded.
        crop_pct: fraction of the resized side that the crop keeps.
        interpolation: one of `FILTERS`; all reduce an image with antialiasing, as Pillow does, except 'nearest'.
        resize_rules: whose rounding of sizes and of the crop's corner, one of `RULES`; they differ by a pixel.
        fill: value of padded pixels for each channel; () for black.

    Raises:
        UserError: a value is not allowed.
    """

    crop_mode: str = "center"
    crop_pct: float = 1.0
    interpolation: str = "bicubic"
    resize_rules: str = "vit_jax"
    fill: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, allowed in (("crop_mode", MODES), ("interpolation", tuple(FILTERS)), ("resize_rules", RULES)):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} is {getattr(self, name)!r}\n  allowed: {', '.join(allowed)}")
        if not 0 < self.crop_pct < math.inf:
            raise UserError(f"crop_pct is {self.crop_pct}\n  allowed: a number above 0")

    @property
    def suffix(self) -> str:
        """What tells the name of a cache of images from those of other preparations; '' for that of training."""
        values = (self.crop_mode, self.crop_pct, self.interpolation, self.resize_rules, *self.fill)
        return "" if self == COVER else "-" + "-".join(map(str, values))

    def resized(self, image: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
        """Returns height and width that an image of height and width `image` is resized to, before the crop to `size`.

        timm and torchvision round the longer side down, but to the nearest integer if `size` is not a square.
        """
        target = tuple(max(1, math.floor(side / self.crop_pct)) for side in size)
        if self.crop_mode == "none":
            return image
        if self.crop_mode == "squash":
            return target
        factors = target[0] / image[0], target[1] / image[1]
        if self.resize_rules == "vit_jax":
            return tuple(max(goal, round(side * max(factors))) for goal, side in zip(target, image, strict=True))
        if self.crop_mode == "border" or (self.resize_rules == "timm" and target[0] != target[1]):
            ratios = image[0] / target[0], image[1] / target[1]
            ratio = max(ratios) if self.crop_mode == "border" else min(ratios)
            return tuple(max(1, round(side / ratio)) for side in image)
        short = min(target)
        return tuple(short if side == min(image) else int(short * side / min(image)) for side in image)

    def corner(self, resized: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
        """Returns the first row and column of the crop; negative where the image is padded before it."""
        excess = [have - want for have, want in zip(resized, size, strict=True)]
        if self.resize_rules == "timm":
            return tuple(round(one / 2) if one >= 0 else -(-one // 2) for one in excess)
        return tuple(one // 2 for one in excess)


COVER = Preparation()


def fit(
    image: Image.Image, size: tuple[int, int], preparation: Preparation = COVER
) -> UInt8[np.ndarray, "height width channels"]:
    """Returns an image in mode L, RGB or RGBA resized and cropped to `size`, height and width."""
    if preparation != COVER or (image.height, image.width) != tuple(size):
        image = _fitted(image, size, preparation)
    return np.asarray(image).reshape(*size, len(image.getbands()))


def _fitted(image: Image.Image, size: tuple[int, int], preparation: Preparation) -> Image.Image:
    resized = preparation.resized((image.height, image.width), size)
    top, left = preparation.corner(resized, size)
    is_padded = top < 0 or left < 0
    if resized[0] * resized[1] > _MAX_EXCESS * size[0] * size[1] and not is_padded and preparation.crop_mode != "none":
        return _resized_window(image, resized, (top, left), size, preparation.interpolation)
    if preparation.crop_mode != "none":
        image = image.resize(resized[::-1], FILTERS[preparation.interpolation][0])
    if is_padded and preparation.fill:
        canvas = Image.new(image.mode, size[::-1], _color(preparation.fill, image.mode))
        canvas.paste(image, (-left, -top))
        return canvas
    return image.crop((left, top, left + size[1], top + size[0]))  # pads with zeros


def _color(fill: tuple[int, ...], mode: str) -> Any:
    return fill[0] if mode == "L" else (*(fill if len(fill) > 1 else 3 * fill), 255)[: len(mode)]


def _resized_window(
    image: Image.Image, resized: tuple[int, int], corner: tuple[int, int], size: tuple[int, int], interpolation: str
) -> Image.Image:
    """Returns the window of the resized image with that corner and size; the rest of it is never computed."""
    resampling, reach = FILTERS[interpolation]
    first, last, start, stop = [], [], [], []
    for length, new_length, offset, count in zip((image.height, image.width), resized, corner, size, strict=True):
        scale = length / new_length
        margin = reach * max(scale, 1) + 1  # the kernel reaches that many pixels, of the coarser grid
        first.append(max(0, math.floor(offset * scale - margin)))
        last.append(min(length, math.ceil((offset + count) * scale + margin)))
        start.append(offset * scale - first[-1])
        stop.append(min((offset + count) * scale, length) - first[-1])
    part = image.crop((first[1], first[0], last[1], last[0]))
    box = (start[1], start[0], stop[1], stop[0])
    return part.resize((size[1], size[0]), resampling, box)
