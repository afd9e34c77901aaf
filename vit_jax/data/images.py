"""Decoding of single images to arrays of a given size and number of channels."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def decode(encoded: bytes | Path, shape: tuple[int, int, int]) -> UInt8[np.ndarray, "height width channels"]:
    """Returns an image in any format that Pillow reads, with the height, width and channels of `shape`.

    Grey, palette and CMYK images are converted to RGB if `shape` has three channels; transparent pixels are blended
    with white, 16-bit values are reduced to 8 bits, and the EXIF orientation is applied. See `resize_and_crop` for
    the size.

    Raises:
        OSError, ValueError, SyntaxError: the data is not an image, or is damaged or truncated.
    """
    from PIL import Image

    with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as image:
        return convert(image, shape)


def convert(image: Any, shape: tuple[int, int, int]) -> UInt8[np.ndarray, "height width channels"]:
    """Returns `decode` of an image that Pillow has opened."""
    from PIL import Image, ImageOps

    mode = _MODES[shape[2]]
    if _is_rotated(image):
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if mode != "RGBA" and (image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info):
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    image = image if image.mode == mode else image.convert(mode)
    return resize_and_crop(np.asarray(image).reshape(image.height, image.width, shape[2]), shape[:2])


def _is_rotated(image: Any) -> bool:
    from PIL import ExifTags

    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except (SyntaxError, ValueError, LookupError, struct.error):  # damaged EXIF data does not make the image unreadable
        return False


def resize_and_crop(
    image: UInt8[np.ndarray, "height width channels"], size: tuple[int, int]
) -> UInt8[np.ndarray, "new_height new_width channels"]:
    """Returns the image resized to cover `size` (height, width), bicubic as in Pillow, then cropped at the centre."""
    from PIL import Image

    height, width, channels = image.shape
    if (height, width) == tuple(size):
        return image
    factor = max(size[0] / height, size[1] / width)
    new_height, new_width = max(size[0], round(height * factor)), max(size[1], round(width * factor))
    opened = Image.fromarray(image[..., 0] if channels == 1 else image)
    resized = np.asarray(opened.resize((new_width, new_height), Image.Resampling.BICUBIC))
    top, left = (new_height - size[0]) // 2, (new_width - size[1]) // 2
    cropped = resized[top : top + size[0], left : left + size[1]]
    return cropped.reshape(*size, channels)
